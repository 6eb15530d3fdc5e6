package redis

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/rueidis"
	"github.com/rs/zerolog"

	"verve/counter"
	"verve/dedup"
	"verve/internal/epochtest"
	"verve/internal/settest"
	"verve/internal/testproc"
)

func TestMain(m *testing.M) {
	testproc.Setup()
	os.Exit(m.Run())
}

// redisServer is a real Redis of the tests.
type redisServer struct {
	*testproc.Redis
	t testing.TB
}

func startRedis(t testing.TB, args ...string) *redisServer {
	t.Helper()
	return &redisServer{testproc.StartRedis(t, args...), t}
}

// pause stops the process, so that it answers nothing, until resume.
func (s *redisServer) pause()  { testproc.Pause(s.Process()) }
func (s *redisServer) resume() { testproc.Resume(s.Process()) }

// do runs a command on a connection of its own and returns its answer as text.
func (s *redisServer) do(args ...string) string {
	s.t.Helper()
	c, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{s.Addr}, ForceSingleClient: true, DisableCache: true})
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	m, err := c.Do(context.Background(), c.B().Arbitrary(args...).Build()).ToMessage()
	if err != nil {
		return err.Error()
	}
	if m.IsArray() {
		list, _ := m.AsStrSlice()
		return strings.Join(list, "\n")
	}
	if n, err := m.AsInt64(); err == nil {
		return fmt.Sprint(n)
	}
	text, _ := m.ToString()
	return text
}

// keys are the names of all that is stored.
func (s *redisServer) keys() []string {
	s.t.Helper()
	all := s.do("KEYS", "*")
	if all == "" {
		return nil
	}
	return strings.Split(all, "\n")
}

// newRedis makes a Redis with a front cache that is connected when it returns.
func newRedis(t testing.TB, addr string, change ...func(*Config)) *Set {
	t.Helper()
	r := newRedisAway(t, addr, change...)
	testproc.Until(t, "the store is ready", func() bool {
		ready, _ := r.Health()
		return ready && r.client.Load() != nil
	})
	othersAreThere(r.ledger)
	return r
}

// epochLength is how the keys of an epoch name its length.
var epochLength = fmt.Sprint(":", epochtest.Window.Milliseconds())

// newRedisAway does not wait for a connection.
func newRedisAway(t testing.TB, addr string, change ...func(*Config)) *Set {
	t.Helper()
	local, err := dedup.NewMemory(dedup.Config{Expect: 1000, Heap: true})
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{URLs: []string{"redis://" + addr}, Group: "test", Window: epochtest.Window, Local: local, Log: zerolog.New(zerolog.NewTestWriter(t))}
	for _, f := range change {
		f(&cfg)
	}
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// patient is for tests in which Redis answers, however busy the machine is.
func patient(c *Config) { c.Timeout = time.Minute }

// sealed seals the n-th epoch and returns its count.
func sealed(t testing.TB, e settest.Epochs, r *Set, n int) (unique uint64, exact bool) {
	t.Helper()
	var ids sealedIDs
	testproc.Until(t, "the epoch is sealed", func() bool { // the first try may meet a connection that was cut
		var err error
		ids, err = r.sealIDs(t.Context(), counter.Span{Start: time.Unix(0, e.At(n)), Window: epochtest.Window}, nil)
		return err == nil
	})
	return ids.unique, ids.exact
}

func TestSet(t *testing.T) {
	settest.Run(t, settest.Config{New: func(t testing.TB, maxIDs uint64) dedup.Set {
		return newRedis(t, startRedis(t).Addr, patient, func(c *Config) { c.MaxIDs = maxIDs })
	}})
}

// TestRedisInstancesCountAsOne has three instances add the same ids at the same moments:
// each id is unique at one of them, and the sealed count is the number of ids.
func TestRedisInstancesCountAsOne(t *testing.T) {
	server := startRedis(t)
	const instances, writers, ids = 3, 8, 5000
	var sets [instances]*Set
	var at [instances]settest.Epochs
	for i := range sets {
		sets[i] = newRedis(t, server.Addr, patient)
		at[i] = settest.NewEpochs(t, sets[i])
	}
	var mu sync.Mutex
	unique := map[string]int{}
	var group sync.WaitGroup
	for i := range sets {
		for w := range writers {
			group.Go(func() {
				for n := range ids {
					id := fmt.Sprint(n)
					if n%3 == 1 {
						id = fmt.Sprintf("%08x-0000-4000-8000-000000000000", n)
					} else if n%3 == 2 {
						id = fmt.Sprint("text ", n, strings.Repeat("x", n%60))
					}
					v, err := at[i].Add(t, sets[i], 0, id)
					if err != nil || v == dedup.Turned {
						t.Errorf("id %s at instance %d, writer %d: %v, %v", id, i, w, v, err)
						return
					}
					if v == dedup.Unique {
						mu.Lock()
						unique[id]++
						mu.Unlock()
					}
				}
			})
		}
	}
	group.Wait()
	if len(unique) != ids {
		t.Errorf("%d ids were unique, want %d", len(unique), ids)
	}
	for id, n := range unique {
		if n != 1 {
			t.Errorf("id %s was unique %d times", id, n)
		}
	}
	for i := range sets {
		if n, exact := sealed(t, at[i], sets[i], 0); n != ids || !exact {
			t.Errorf("instance %d: sealed %d, exact %v; want %d, true", i, n, exact, ids)
		}
	}
	if v, err := at[0].Add(t, sets[0], 0, "after the seal"); v != dedup.Turned || err != nil {
		t.Errorf("after the seal: %v, %v; want Turned", v, err)
	}
}

// TestLiveCountIsOfTheWindowAskedFor: at a turn two are open for a moment, and a callback names
// the start of the one that it counts.
func TestLiveCountIsOfTheWindowAskedFor(t *testing.T) {
	r := newRedis(t, startRedis(t).Addr, patient)
	e := settest.NewEpochs(t, r)
	e.Want(t, r, 0, "1", dedup.Unique)
	e.Want(t, r, 0, "2", dedup.Unique)
	in, _ := e.Enter(e.At(0), 0, 1) // keeps it from its seal
	defer in.Leave(0, 0, 1)
	e.Want(t, r, 1, "1", dedup.Unique)
	first, second := in.Epoch.Start(), e.Last().Start()
	if a, b, c := r.Live(first), r.Live(second), r.Live(second.Add(time.Hour)); a != 2 || b != 1 || c != 0 {
		t.Errorf("got %d, %d and %d; want 2, 1 and 0", a, b, c)
	}
}

// TestRedisIsAwayAtTheStart: an instance can start before its Redis.
func TestRedisIsAwayAtTheStart(t *testing.T) {
	server := startRedis(t)
	server.Kill()
	r := newRedisAway(t, server.Addr)
	e := settest.NewEpochs(t, r)
	testproc.Until(t, "ids are refused", func() bool {
		_, err := e.Add(t, r, 0, "1")
		return errors.Is(err, dedup.ErrUnavailable)
	})
	if ready, reason := r.Health(); ready || reason == "" {
		t.Errorf("health: %v, %q; want a reason", ready, reason)
	}
	server.Start()
	testproc.Until(t, "ids are taken", func() bool {
		v, err := e.Add(t, r, 0, "1")
		return v == dedup.Unique && err == nil
	})
	if n, exact := sealed(t, e, r, 0); n != 1 || !exact {
		t.Errorf("sealed %d, exact %v; want 1, true", n, exact)
	}
}
