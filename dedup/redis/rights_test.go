package redis

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"verve/dedup"
	"verve/internal/settest"
	"verve/internal/testproc"
)

// documentedUser is the ACL SETUSER command of docs/instances.md for a user.
func documentedUser(t *testing.T) []string {
	t.Helper()
	page, err := os.ReadFile("../../docs/instances.md")
	if err != nil {
		t.Fatal(err)
	}
	line := regexp.MustCompile(`ACL SETUSER verve .*`).FindString(string(page))
	if line == "" {
		t.Fatal("docs/instances.md has no ACL SETUSER")
	}
	return strings.Fields(strings.Replace(line, ">PASSWORD", ">secret", 1))
}

// TestRedisRightsThatAreMissingAreNamed: the rights that docs/instances.md lists are
// enough. Without one that is needed the instance is not ready, also without traffic, and
// names it; it is ready again by itself. Rights that are only convenient may be missing.
func TestRedisRightsThatAreMissingAreNamed(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	if got := server.do(documentedUser(t)...); got != "OK" {
		t.Fatalf("Redis says of the documented user: %s", got)
	}
	r := newRedis(t, server.Addr, patient, func(c *Config) { c.URLs = []string{"redis://verve:secret@" + server.Addr} })
	e := settest.NewEpochs(t, r)
	e.Want(t, r, 0, "42", dedup.Unique)
	e.Want(t, r, 0, "a text", dedup.Unique)
	for _, right := range []string{"+sadd", "+hset", "+zadd", "+unlink", "+smismember", "~verve:*"} {
		deny, grant := strings.Replace(right, "+", "-", 1), right
		if right[0] == '~' {
			deny = "resetkeys"
		}
		server.do("ACL", "SETUSER", "verve", deny)
		testproc.Until(t, "it names "+right, func() bool {
			ready, reason := r.Health()
			return !ready && strings.Contains(reason, right)
		})
		server.do("ACL", "SETUSER", "verve", grant)
		testproc.Until(t, "it is ready again with "+right, func() bool {
			ready, _ := r.Health()
			return ready
		})
	}
	server.do("ACL", "SETUSER", "verve", "-info", "-role")
	server.do("SCRIPT", "FLUSH")
	e.Want(t, r, 0, "43", dedup.Unique)
	testproc.Until(t, "ids are taken without what is convenient", func() bool {
		ready, _ := r.Health()
		return ready
	})
	untilSettled(t, r) // a right that was missing may have been taken for a loss
	if n, exact := sealed(t, e, r, 0); n != 3 || !exact {
		t.Errorf("sealed %d, exact %t; want 3, true", n, exact)
	}
}

// TestRefusalIsNoOutage: what Redis refuses from the start on is the reason for not being
// ready, for each id that is refused, and in the log, and nothing calls it unreachable.
func TestRefusalIsNoOutage(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ path, deny, why string }{
		{"", "-evalsha", "the Redis user lacks a permission: +evalsha"},
		{"", "resetkeys", "the Redis user lacks a permission: ~verve:*"},
		{"/99", "+evalsha", "Redis refuses: DB index is out of range"},
	} {
		server := startRedis(t)
		server.do(documentedUser(t)...)
		server.do("ACL", "SETUSER", "verve", tt.deny)
		var log testproc.Buffer
		r := newRedisAway(t, server.Addr, func(c *Config) {
			c.URLs, c.Log, c.Timeout = []string{"redis://verve:secret@" + server.Addr + tt.path}, zerolog.New(&log), 2*time.Second
		})
		e := settest.NewEpochs(t, r)
		testproc.Until(t, "each id, the readiness and the log have "+tt.why, func() bool {
			_, err := e.Add(t, r, 0, "42")
			ready, reason := r.Health()
			return !ready && reason == tt.why && err != nil && strings.Contains(err.Error(), tt.why) && strings.Contains(log.String(), tt.why)
		})
		if strings.Contains(log.String(), "unreachable") {
			t.Errorf("%s: the log calls it unreachable:\n%s", tt.why, log.String())
		}
	}
}

// TestEveryCommandIsDocumented: what the code sends is in the documented user's
// rights, and looked into.
func TestEveryCommandIsDocumented(t *testing.T) {
	scripts, err := os.ReadFile("scripts.go")
	if err != nil {
		t.Fatal(err)
	}
	granted := documentedUser(t)
	command := regexp.MustCompile(`(?:call|try)\('([A-Z]+)'`)
	for _, m := range command.FindAllStringSubmatch(string(scripts)+laneLua, -1) {
		if name := strings.ToLower(m[1]); !slices.Contains(granted, "+"+name) {
			t.Errorf("docs/instances.md does not grant +%s", name)
		} else if name != "info" && !strings.Contains(laneLua, "{'"+m[1]+"'") {
			t.Errorf("%s is not looked into", m[1])
		}
	}
}

// TestEachNodeIsCheckedByItsOwnName: the nodes of a cluster, and Sentinels, have
// certificates for the address that each is dialled at, not for the first one's.
func TestEachNodeIsCheckedByItsOwnName(t *testing.T) {
	for _, urls := range [][]string{
		{"rediss://one:6379"},
		{"rediss://one:6379", "rediss://two:6379"},
		{"rediss-sentinel://one:26379?master_set=m", "rediss-sentinel://two:26379"},
	} {
		o, err := redisOption(&Config{URLs: urls})
		if err != nil {
			t.Fatal(err)
		}
		if o.TLSConfig == nil || o.TLSConfig.ServerName != "" || o.Sentinel.TLSConfig != nil && o.Sentinel.TLSConfig.ServerName != "" {
			t.Errorf("%v: TLS %+v, of Sentinels %+v; want no name", urls, o.TLSConfig, o.Sentinel.TLSConfig)
		}
	}
}
