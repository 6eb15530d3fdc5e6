package system_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"verve/counter"
	"verve/dedup"
	"verve/dedup/redis"
	"verve/internal/settest"
	"verve/internal/testproc"
	"verve/stream"
)

// skewed is an instance without its HTTP whose requests come by a clock that is
// ahead of the machine's.
type skewed struct {
	ahead   time.Duration
	set     *redis.Set
	count   *counter.Counter
	records *stream.Stream
}

func startSkewed(t *testing.T, name, dir, addr string, window, ahead time.Duration) *skewed {
	t.Helper()
	local, err := dedup.NewMemory(dedup.Config{})
	if err != nil {
		t.Fatal(err)
	}
	set, err := redis.New(redis.Config{
		URLs: []string{"redis://" + addr}, Group: "skew", Instance: name, Window: window, Local: local, Timeout: 10 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	spool, err := stream.OpenSpool(stream.SpoolConfig{Group: "skew", Instance: name})
	if err != nil {
		t.Fatal(err)
	}
	records, err := stream.New(stream.Config{
		Scope: stream.ScopeGroup, Claims: set.Ledger(), CountsFile: filepath.Join(dir, name, "counts.jsonl"),
	}, spool)
	if err != nil {
		t.Fatal(err)
	}
	group, err := redis.NewGroup(set.Ledger(), records, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	count, err := counter.New(counter.Config{Window: window, Store: set, Publisher: group})
	if err != nil {
		t.Fatal(err)
	}
	s := &skewed{ahead, set, count, records}
	ctx, stop := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	closed := make(chan struct{})
	parts.Go(func() { _ = records.Run(ctx) })
	parts.Go(func() { _ = group.Run(ctx) })
	parts.Go(func() { _ = set.Run(ctx) })
	parts.Go(func() { defer close(closed); _ = count.Run(ctx) })
	t.Cleanup(func() {
		leaving, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		group.Leaving()
		count.Seal()
		<-closed
		if err := errors.Join(group.Leave(leaving), records.Flush(leaving), group.ReportDelivered(leaving)); err != nil {
			t.Error(err)
		}
		stop()
		parts.Wait()
		records.Close()
		_ = set.Close()
		_ = spool.Close()
	})
	return s
}

// accept is what the server does with an id.
func (s *skewed) accept(id string) (window time.Time, unique bool, err error) {
	now := time.Now().Add(s.ahead).UnixNano()
	for {
		in, open := s.count.Enter(now, 0, 1)
		if !open {
			return time.Time{}, false, errors.New("sealed")
		}
		v, err := settest.AddTo(s.set, in.Epoch, []byte(id))
		if err == nil && v == dedup.Unique {
			in.Leave(1, 0, 0)
		} else {
			in.Leave(0, 0, 1)
		}
		if err != nil || v != dedup.Turned {
			return in.Start(), v == dedup.Unique, err
		}
		s.count.TurnFrom(in.Epoch)
	}
}

// TestClocksThatDifferChangeNoSum: two instances whose clocks are more than a
// window apart. Every window's record is the number of ids that were ok in it,
// each once, wherever it was asked.
func TestClocksThatDifferChangeNoSum(t *testing.T) {
	t.Parallel()
	server, dir := testproc.StartRedis(t), t.TempDir()
	const window = 400 * time.Millisecond
	type key struct {
		window time.Time
		id     string
	}
	var mu sync.Mutex
	ok := map[key]int{}
	sums := map[time.Time]int{}
	t.Run("", func(t *testing.T) { // its cleanup stops the instances
		instances := []*skewed{
			startSkewed(t, "a", dir, server.Addr, window, 0),
			startSkewed(t, "b", dir, server.Addr, window, 700*time.Millisecond),
		}
		var asking sync.WaitGroup
		until := time.Now().Add(15 * window)
		enough := func() bool { // also on a busy machine
			mu.Lock()
			defer mu.Unlock()
			return len(sums) >= 10 && time.Now().After(until) || time.Now().After(until.Add(time.Minute))
		}
		for i := range 8 {
			asking.Go(func() {
				s := instances[i%2]
				for !enough() {
					id := fmt.Sprint(rand.IntN(300))
					start, unique, err := s.accept(id)
					if err != nil {
						t.Error(err)
						return
					}
					if unique {
						mu.Lock()
						ok[key{start, id}]++
						sums[start]++
						mu.Unlock()
					}
				}
			})
		}
		asking.Wait()
	})
	for k, n := range ok {
		if n != 1 {
			t.Errorf("id %s was ok %d times in %v", k.id, n, k.window)
		}
	}
	windows := groupRecords(t, dir)
	wantOnce(t, windows)
	if len(sums) < 10 {
		t.Errorf("only %d windows", len(sums))
	}
	for start, want := range sums {
		rs := windows[start]
		if len(rs) != 1 || rs[0].Unique != want {
			t.Errorf("window %v: %d ids were ok, the records are %+v", start, want, rs)
		}
	}
}
