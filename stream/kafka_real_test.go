package stream

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"verve/internal/testproc"

	"github.com/twmb/franz-go/pkg/kadm"
)

// brokerPatience is how long a test waits for a broker and the processes beside it: on a
// busy machine a JVM alone takes a minute to start.
const brokerPatience = 5 * time.Minute

// broker is an Apache Kafka broker and controller in one process, from the jars
// in VERVE_TEST_KAFKA_JARS: org.apache.kafka:kafka_2.13 and what it depends on.
type broker struct {
	jars, dir   string
	plain, sasl string // addresses
	cmd         *exec.Cmd
	log         *os.File
}

// realBroker starts a broker or skips, which VERVE_TEST_REQUIRE can forbid.
func realBroker(t *testing.T) *broker {
	t.Helper()
	jars := os.Getenv("VERVE_TEST_KAFKA_JARS")
	if jars == "" {
		testproc.Missing(t, "kafka", "VERVE_TEST_KAFKA_JARS does not name a folder with Kafka's jars")
	}
	testproc.Needs(t, "java", "kafka")
	b := &broker{jars: jars, dir: t.TempDir()}
	ports := []string{testproc.FreeAddr(t), testproc.FreeAddr(t), testproc.FreeAddr(t)}
	// Retention is off: the tests' windows are older than it.
	b.plain, b.sasl = ports[0], ports[1]
	config := fmt.Sprintf(`
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@%[3]s
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://%[1]s,SASL://%[2]s,CONTROLLER://%[3]s
advertised.listeners=PLAINTEXT://%[1]s,SASL://%[2]s
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
listener.name.sasl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required user_verve="secret";
listener.name.sasl.scram-sha-256.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.sasl.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
log.dirs=%[4]s
num.partitions=3
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=3
log.retention.ms=-1
`, ports[0], ports[1], ports[2], filepath.Join(b.dir, "data"))
	if err := os.WriteFile(b.path("server.properties"), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	var err error
	if b.log, err = os.Create(b.path("broker.log")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.log.Close() })
	// Any 16 bytes in base64 are a cluster id.
	format := b.java("kafka.tools.StorageTool", "format", "-t", "dmVydmUtdGVzdC0wMDAwMQ", "-c", b.path("server.properties"),
		"-S", "SCRAM-SHA-256=[name=verve,password=secret]", "-S", "SCRAM-SHA-512=[name=verve,password=secret]")
	if err := format.Run(); err != nil {
		t.Fatalf("format the broker's storage: %v\n%s", err, b.tail())
	}
	b.start(t)
	t.Cleanup(func() { b.kill(t, syscall.SIGKILL) })
	return b
}

func (b *broker) path(name string) string { return filepath.Join(b.dir, name) }

func (b *broker) java(args ...string) *exec.Cmd {
	cmd := exec.Command("java", append([]string{"-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
		"-cp", filepath.Join(b.jars, "*")}, args...)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = b.dir, b.log, b.log
	return cmd
}

// start returns when the broker answers. The tests are about what it does next,
// and the machine decides how long a JVM takes.
func (b *broker) start(t *testing.T) {
	t.Helper()
	b.cmd = b.java("kafka.Kafka", b.path("server.properties"))
	if err := b.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	cfg := b.config("")
	client, err := cfg.client()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for deadline := time.Now().Add(brokerPatience); ; {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		err := client.Ping(ctx)
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the broker does not answer: %v\n%s", err, b.tail())
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (b *broker) kill(t *testing.T, signal syscall.Signal) {
	t.Helper()
	if b.cmd == nil {
		return
	}
	if err := b.cmd.Process.Signal(signal); err != nil {
		t.Error(err)
	}
	b.cmd.Wait()
	b.cmd = nil
}

func (b *broker) tail() string {
	out, err := os.ReadFile(b.log.Name())
	if err != nil {
		return err.Error()
	}
	return string(out[max(0, len(out)-4000):])
}

func (b *broker) config(topic string) KafkaConfig {
	return KafkaConfig{Brokers: []string{b.plain}, Topic: topic}
}

func (b *broker) create(t *testing.T, topic string, settings map[string]string) {
	t.Helper()
	cfg := b.config("")
	client, err := cfg.client()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	given := make(map[string]*string)
	for name, value := range settings {
		given[name] = &value
	}
	if _, err := kadm.NewClient(client).CreateTopic(t.Context(), 1, 1, given, topic); err != nil {
		t.Fatal(err)
	}
}

// rounds is how often the client is killed at each step.
func rounds(t *testing.T) int {
	t.Helper()
	s := os.Getenv("VERVE_TEST_ROUNDS")
	if s == "" {
		return 4
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("VERVE_TEST_ROUNDS=%q", s)
	}
	return n
}

func TestRealKafka(t *testing.T) {
	b := realBroker(t)

	t.Run("TopicMissingAtTheStart", func(t *testing.T) {
		s := start(t, t.TempDir(), Config{Kafka: b.config("missing")})
		for i := range 5 {
			s.publish(t, i, i+1)
			if i%2 == 0 {
				s.flush(t, brokerPatience)
			}
		}
		s.flush(t, brokerPatience)
		wantWindows(t, readTopic(t, b.config("missing")), 5)
	})

	t.Run("WrongPasswordIsPutRightWithoutARestart", func(t *testing.T) {
		for _, mechanism := range []string{"PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"} {
			path := filepath.Join(t.TempDir(), "password")
			if err := os.WriteFile(path, []byte("wrong"), 0o600); err != nil {
				t.Fatal(err)
			}
			cfg := b.config("sasl." + mechanism)
			cfg.Brokers = []string{b.sasl}
			cfg.SASL, cfg.User, cfg.PasswordFile = mechanism, "verve", path
			s := start(t, t.TempDir(), Config{Kafka: cfg})
			s.publish(t, 0, 3)
			for deadline := time.Now().Add(brokerPatience); firstError(s.Stats()) == ""; time.Sleep(10 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%s: no word about the wrong password: %+v", mechanism, s.Stats())
				}
			}
			if text := firstError(s.Stats()); !strings.Contains(text, "SASL_AUTHENTICATION_FAILED") {
				t.Errorf("%s: the reason is %q", mechanism, text)
			}
			if err := os.WriteFile(path, []byte("secret\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			s.flush(t, brokerPatience)
			wantWindows(t, readTopic(t, cfg), 3)
		}
	})

	t.Run("BrokerKilledUnderRecords", func(t *testing.T) {
		dir := t.TempDir()
		cfg := Config{Kafka: b.config("killed"), CountsFile: filepath.Join(dir, "counts.jsonl")}
		s := start(t, dir, cfg)
		const windows = 60
		published := make(chan int)
		go func() {
			defer close(published)
			for i := range windows {
				if err := s.Publish(context.Background(), window(i)); err != nil {
					t.Error(err)
					return
				}
				published <- i
				time.Sleep(20 * time.Millisecond) // records under way at any moment of the kill
			}
		}()
		for i := range published {
			if i == windows/2 {
				b.kill(t, syscall.SIGKILL)
			}
		}
		b.start(t)
		s.flush(t, brokerPatience)
		s.stop()
		wantWindows(t, readTopic(t, b.config("killed")), windows)
		wantWindows(t, readCounts(t, cfg.CountsFile), windows)
	})

	t.Run("BrokerStoppedFor120Windows", func(t *testing.T) {
		dir := t.TempDir()
		s := start(t, dir, Config{Kafka: b.config("stopped")})
		s.publish(t, 0, 2)
		s.flush(t, brokerPatience)
		b.kill(t, syscall.SIGTERM)
		s.publish(t, 2, 62)
		s.stop() // and a restart without a broker
		s = start(t, dir, Config{Kafka: b.config("stopped")})
		s.publish(t, 62, 122)
		b.start(t)
		s.flush(t, brokerPatience)
		s.stop()
		wantWindows(t, readTopic(t, b.config("stopped")), 122)
	})

	t.Run("BrokerFrozen", func(t *testing.T) {
		s := start(t, t.TempDir(), Config{Kafka: b.config("frozen")})
		s.publish(t, 0, 2)
		s.flush(t, brokerPatience)
		if err := testproc.Pause(b.cmd.Process); err != nil {
			t.Fatal(err)
		}
		s.publish(t, 2, 5)
		ctx, cancel := context.WithTimeout(context.Background(), 12*time.Second) // beyond stepWait
		defer cancel()
		if err := s.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("flush to a frozen broker: %v", err)
		}
		if err := testproc.Resume(b.cmd.Process); err != nil {
			t.Fatal(err)
		}
		s.flush(t, brokerPatience)
		wantWindows(t, readTopic(t, b.config("frozen")), 5)
	})

	t.Run("GroupRecordIsVisibleOnce", func(t *testing.T) {
		const windows = 4
		var streams []running
		for range 3 {
			streams = append(streams, start(t, "", Config{Scope: ScopeGroup, Kafka: b.config("group")}))
		}
		for i := range windows {
			for _, s := range streams {
				s.publish(t, i, i+1)
			}
		}
		for _, s := range streams {
			s.flush(t, brokerPatience)
		}
		got := readTopic(t, b.config("group"))
		if len(got) != windows {
			t.Fatalf("%d records, want %d", len(got), windows)
		}
		for i, r := range got {
			if !r.WindowStart.Equal(window(i).Start) {
				t.Errorf("record %d is %s", i, r.Key())
			}
		}
	})

	t.Run("TopicTakesOnlyRecentTimes", func(t *testing.T) {
		cfg := b.config("recent")
		cfg.KeysTopic = "recent.keys"
		for _, topic := range []string{cfg.Topic, cfg.KeysTopic} {
			b.create(t, topic, map[string]string{"message.timestamp.before.max.ms": "3000", "message.timestamp.after.max.ms": "3000"})
		}
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		s.publish(t, 0, 50)
		for i := 50; i < 60; i++ {
			if err := s.Publish(t.Context(), withKeys(window(i), 2)); err != nil {
				t.Fatal(err)
			}
		}
		s.flush(t, brokerPatience)
		if n := s.Stats().DeadLetters; n != 0 {
			t.Errorf("%d records are set aside", n)
		}
		wantWindows(t, readTopic(t, cfg), 60)
		if n := len(readKeys(t, ReadKeysTopic(t.Context(), cfg, false))); n != 20 {
			t.Errorf("%d records by key", n)
		}
	})

	t.Run("KeysInSmallBatches", func(t *testing.T) {
		cfg := b.config("small")
		cfg.KeysTopic = "small.keys"
		b.create(t, cfg.KeysTopic, map[string]string{"max.message.bytes": "4000"})
		s := start(t, t.TempDir(), Config{Kafka: cfg})
		for i := range 2 {
			if err := s.Publish(t.Context(), withKeys(window(i), 3000)); err != nil {
				t.Fatal(err)
			}
		}
		s.flush(t, brokerPatience)
		if n := s.Stats().DeadLetters; n != 0 {
			t.Errorf("%d records are set aside", n)
		}
		wantWindows(t, readTopic(t, cfg), 2)
		wantKeys(t, readKeys(t, ReadKeysTopic(t.Context(), cfg, false)), 2, 3000)
	})

	t.Run("Kill", func(t *testing.T) { killAtEveryStep(t, []string{b.plain}, 0, rounds(t)) })
	t.Run("KillWithKeys", func(t *testing.T) { killAtEveryStep(t, []string{b.plain}, 5, rounds(t)) })

	t.Run("HundredThousandKeys", func(t *testing.T) {
		const keys = 100_000
		s := start(t, t.TempDir(), Config{Kafka: b.config("many")})
		s.publish(t, 0, 1) // the session is there
		s.flush(t, brokerPatience)
		for i := 1; i < 4; i++ {
			count := withKeys(window(i), keys)
			began := time.Now()
			if err := s.Publish(t.Context(), count); err != nil {
				t.Fatal(err)
			}
			spooled := time.Since(began)
			s.flush(t, brokerPatience)
			t.Logf("record %d: in the spool after %s, visible after %s", i, spooled, time.Since(began))
		}
		got := readKeys(t, ReadKeysTopic(t.Context(), b.config("many"), false))
		if len(got) != 3*keys {
			t.Errorf("%d records by key, want %d", len(got), 3*keys)
		}
	})
}
