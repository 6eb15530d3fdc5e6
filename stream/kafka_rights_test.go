package stream

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"

	"verve/internal/testproc"
)

// right is an ACL that allows an operation.
type right struct {
	operation, kind, name string
	prefixed              bool
}

// documentedRights are those of the kafka-acls.sh commands in docs/operations.md.
func documentedRights(t *testing.T) (all []right) {
	t.Helper()
	page, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	operation := regexp.MustCompile(`--operation (\S+)`)
	resource := regexp.MustCompile(`--(topic|transactional-id) (\S+)`)
	for line := range strings.Lines(string(page)) {
		if r := resource.FindStringSubmatch(line); r != nil && strings.Contains(line, "--operation") {
			for _, o := range operation.FindAllStringSubmatch(line, -1) {
				all = append(all, right{o[1], r[1], r[2], strings.Contains(line, "--resource-pattern-type prefixed")})
			}
		}
	}
	if len(all) != 6 {
		t.Fatalf("docs/operations.md lists the rights %v", all)
	}
	return all
}

func (r right) acl(t *testing.T) kfake.ACL {
	t.Helper()
	operation, err := kmsg.ParseACLOperation(r.operation)
	if err != nil {
		t.Fatal(err)
	}
	a := kfake.ACL{Name: r.name, Operation: operation, Allow: true, Resource: kmsg.ACLResourceTypeTopic, Pattern: kmsg.ACLResourcePatternTypeLiteral}
	if r.kind == "transactional-id" {
		a.Resource = kmsg.ACLResourceTypeTransactionalId
	}
	if r.prefixed {
		a.Pattern = kmsg.ACLResourcePatternTypePrefixed
	}
	return a
}

// TestKafkaRightsThatAreMissingAreNamed: the rights that docs/operations.md lists
// are enough, and one that is missing is named before there is a record: as the
// reason of the failure, or, if records can be delivered without it, in the log.
func TestKafkaRightsThatAreMissingAreNamed(t *testing.T) {
	for _, tt := range []struct {
		name    string
		without func(right) bool
		topic   bool   // there is one
		failure string // in the reason
		warning string // in the log
		early   bool   // also before there is a record
	}{
		{"all are there", func(right) bool { return false }, true, "", "", true},
		{"all are there, no topic is", func(right) bool { return false }, false, "", "", true},
		{"nothing about the topic", func(r right) bool { return r.kind == "topic" }, true, "Describe, and Create if it is missing, on topic verve.unique-ids", "", true},
		{"no writing", func(r right) bool { return r.kind == "topic" && r.operation == "Write" }, true, "Write on topic verve.unique-ids", "", false},
		{"no reading", func(r right) bool { return r.operation == "Read" }, true, "", "Read on topic verve.unique-ids", true},
		{"neither writing nor transactions", func(r right) bool { return r.operation == "Write" }, true, "Write on topic verve.unique-ids", "", true},
		{"no transactions", func(r right) bool { return r.kind == "transactional-id" }, true, "", "Write and Describe on transactional ids with the prefix verve/", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var acls []kfake.ACL
			for _, r := range documentedRights(t) {
				if !tt.without(r) {
					acls = append(acls, r.acl(t))
				}
			}
			opts := []kfake.Opt{kfake.EnableSASL(), kfake.EnableACLs(), kfake.User("PLAIN", "verve", "secret", acls...), kfake.AllowAutoTopicCreation()}
			if !tt.topic {
				opts = append(opts, kfake.SeedTopics(1, "another"))
			}
			inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
				password := filepath.Join(t.TempDir(), "password")
				if err := os.WriteFile(password, []byte("secret\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				cfg.SASL, cfg.User, cfg.PasswordFile = "PLAIN", "verve", password
				if !tt.topic {
					cfg.Topic += ".new"
				}
				var log testproc.Buffer
				s := start(t, t.TempDir(), Config{Kafka: cfg, Log: zerolog.New(&log).Level(zerolog.WarnLevel)})
				time.Sleep(30 * time.Second)
				if got := firstError(s.Stats()); tt.early && (got == "") != (tt.failure == "") || tt.early && !strings.Contains(got, tt.failure) {
					t.Errorf("before the first record: failure %q, want %q", got, tt.failure)
				}
				s.publish(t, 0, 1)
				time.Sleep(30 * time.Second)
				st := s.Stats()
				if got := firstError(st); (got == "") != (tt.failure == "") || !strings.Contains(got, tt.failure) || (st.Pending == 0) != (tt.failure == "") {
					t.Errorf("%d pending, failure %q, want %q", st.Pending, got, tt.failure)
				}
				s.stop()
				if got := log.String(); tt.failure == "" && tt.warning == "" && got != "" || !strings.Contains(got, tt.warning) {
					t.Errorf("the log: %s\nwant %q", got, tt.warning)
				}
			}, opts...)
		})
	}
}

// TestKafkaBrokerWithShortTransactions: where the broker allows less than the
// timeout wanted, transactions have a shorter one, and one line says so; without
// transactions it goes on only where not even the shortest is allowed.
func TestKafkaBrokerWithShortTransactions(t *testing.T) {
	for _, tt := range []struct {
		allowed string // ms
		want    string
	}{
		{"10000", `"timeout":"6.25s"`},
		{"1500", `"timeout":"1s"`},
		{"500", "refuses transactions"},
	} {
		t.Run(tt.allowed, func(t *testing.T) {
			inBubble(t, func(t *testing.T, c *kfake.Cluster, cfg KafkaConfig) {
				var log testproc.Buffer
				s := start(t, t.TempDir(), Config{Kafka: cfg, Log: zerolog.New(&log)})
				for i := range 5 {
					if i == 3 { // a new session
						c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.UnknownServerError})
					}
					s.publish(t, i, i+1)
					s.flush(t, time.Minute)
				}
				s.stop()
				if got := log.String(); strings.Count(got, tt.want) != 1 || strings.Count(got, "ransactions") != 1 {
					t.Errorf("the log: %s\nwant one line with %s", got, tt.want)
				}
				wantWindows(t, readTopic(t, cfg), 5)
			}, kfake.BrokerConfigs(map[string]string{"transaction.max.timeout.ms": tt.allowed}))
		})
	}
}
