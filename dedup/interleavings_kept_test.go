//go:build interleavings && unix

package dedup

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"verve/counter"
	"verve/internal/explore"
	"verve/internal/explore/atomic"
)

// keptScene is a scene with a journal, whose process is killed.
type keptScene struct {
	*scene
	cfg       Config
	published atomic.Uint64 // 1 + the count of the first epoch; 0: it has no record
}

// newKept opens n epochs in a directory of its own. Segments have two chunks.
func newKept(r *explore.Run, n int) *keptScene {
	parent, err := os.MkdirTemp(inMemory(), "interleavings")
	dir := filepath.Join(parent, "epochs")
	if err == nil {
		err = os.Mkdir(dir, 0o755)
	}
	if err != nil {
		panic(err)
	}
	cfg := Config{
		Dir: dir, Heap: true, boot: 1, segmentChunks: 3,
		bootAt: func() time.Time { return time.Unix(0, 0) },
		msync:  func(string, []byte) error { return nil },
	}
	k := &keptScene{cfg: cfg}
	k.scene = newScene(cfg, 1, n)
	r.Kill()
	r.Cleanup(func() {
		letGo(k.m)
		_ = os.RemoveAll(parent)
	})
	return k
}

// inMemory is where files do not wait for a disk; empty where there is no such place.
func inMemory() string {
	const shared = "/dev/shm"
	if info, err := os.Stat(shared); err != nil || !info.IsDir() {
		return ""
	}
	return shared
}

// letGo releases what the end of the process would release.
func letGo(m *Memory) {
	j := m.journal
	for _, s := range j.segments {
		if s != nil {
			unmapFile(s.memory)
		}
	}
	unmapFile(j.state)
	_ = j.lock.Close()
	j.segments, j.state = nil, nil
}

// successor is the next process, and what it finds in the directory.
type successor struct {
	*Memory
	past   counter.Past
	serial uint64
	view   *View // of the epoch opened last
}

// recall opens the directory as the next process would.
func (k *keptScene) recall() (*successor, error) {
	_ = k.m.journal.lock.Close()
	cfg := k.cfg
	var aside error
	cfg.OnSetAside = func(_ string, reason error) { aside = reason }
	m, err := NewMemory(cfg)
	if err == nil {
		err = aside
	}
	if err != nil {
		return nil, fmt.Errorf("the next process: %w", err)
	}
	j := m.journal
	f := &successor{Memory: m, serial: j.newest.serial}
	f.view = &View{tag: tagOf(f.serial), narrow: m.narrow.open, wide: m.wide.open}
	published := counter.Published{}
	if n := k.published.Load(); n > 0 {
		published = counter.Published{Last: k.epochs[0].Start(), Unique: n - 1}
	}
	records := j.counts
	f.past = m.Past(map[string]counter.Published{"": published})
	j.counts = records
	return f, nil
}

// check compares what the next process has of each epoch with the answers: each id that was
// answered as new has one record, and an id that was not sent has none.
func (k *keptScene) check() error {
	f, err := k.recall()
	if err != nil {
		return err
	}
	defer letGo(f.Memory)
	for epoch := range k.epochs {
		serial := uint64(epoch) + 1
		brought, answered := map[Key]bool{}, map[Key]int{}
		for _, a := range k.added {
			if a.epoch != epoch {
				continue
			}
			brought[a.key] = true
			if a.done && a.verdict == Unique {
				answered[a.key]++
			}
		}
		has := 0
		if serial == f.serial {
			for key := range brought {
				knows := f.Knows(f.view, key)
				has += b2i(knows)
				if answered[key] > 0 && !knows {
					return fmt.Errorf("key %x was new in epoch %d, and the next process does not know it", key.lo, epoch)
				}
			}
			if records := f.journal.counts[serial].sum(); records != uint64(has) {
				return fmt.Errorf("epoch %d has %d records of %d ids", epoch, records, has)
			}
		}
		for key, n := range answered {
			if n > 1 {
				return fmt.Errorf("key %x was new %d times in epoch %d", key.lo, n, epoch)
			}
		}
		if epoch == 0 || serial < f.serial {
			if err := k.total(f, serial, len(answered), len(brought)); err != nil {
				return err
			}
		}
	}
	return nil
}

// total checks the sum of two counts of an epoch: that of its record, which only the first
// epoch may have, and what the next process will publish of it. The sum must be at least the
// ids that were answered and at most those that were sent.
func (k *keptScene) total(next *successor, serial uint64, answered, brought int) error {
	var sum uint64
	recorded := serial == 1 && k.published.Load() > 0
	if recorded {
		sum = k.published.Load() - 1
	}
	left := false
	for _, l := range next.past.Recovered {
		if l.Serial == serial {
			sum += l.Unique
			left = true
		}
	}
	if !recorded && !left {
		return fmt.Errorf("epoch %d has no record, and the next process does not publish one", serial)
	}
	if sum < uint64(answered) || sum > uint64(brought) {
		return fmt.Errorf("epoch %d gets a count of %d; answered were %d ids, brought %d", serial, sum, answered, brought)
	}
	return nil
}

// TestInterleavingsOfRecords: the process is killed between any two stores, among
// them those of the words of a record.
func TestInterleavingsOfRecords(t *testing.T) {
	eachKind(t, explore.OptionsFor(1, 1, 2), func(r *explore.Run, kind kind) {
		k := newKept(r, 1)
		a, b, c := kind.key(7, 1), kind.key(7, 2), kind.key(9, 3)
		k.adds(r, "abc", 0, a, b, c)
		k.adds(r, "ba", 0, b, a)
		r.Check(k.check)
	})
}

// TestInterleavingsOfChunks: more ids than a segment has room for.
func TestInterleavingsOfChunks(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(0, 1, 2), func(r *explore.Run) {
		k := newKept(r, 1)
		var keys [3][]Key
		for i := range keys {
			for n := range uint64(5) {
				keys[i] = append(keys[i], kinds[0].key(2*n, 10*uint64(i)+n))
			}
			k.adds(r, fmt.Sprint("adds ", i), 0, keys[i]...)
		}
		r.Check(k.check)
	})
}

// TestInterleavingsOfPublishing: an epoch is turned, its count is published and its slot ended,
// while requests are inside it or add to the next one.
func TestInterleavingsOfPublishing(t *testing.T) {
	eachKind(t, explore.OptionsFor(0, 1, 2), func(r *explore.Run, kind kind) {
		k := newKept(r, 1)
		first := k.epochs[0]
		k.added = []add{{epoch: 0, key: kind.key(7, 1)}, {epoch: 0, key: kind.key(7, 2)}}
		for i := range k.added {
			a := &k.added[i]
			r.Go(fmt.Sprint("request ", i), func() { k.answer(a) })
		}
		r.Go("turn", func() { k.c.TurnFrom(first) })
		r.Go("closer", func() {
			for k.c.Last() == first || !first.Idle() {
				explore.Wait()
			}
			k.published.Store(first.Unique() + 1)
			first.State.Retire()
		})
		r.Check(func() error {
			k.epochs = []*counter.Epoch{first}
			if last := k.c.Last(); last != first {
				k.epochs = append(k.epochs, last)
			}
			return k.check()
		})
	})
}

// answer is a request that adds a key to the open epoch, as the server does.
func (k *keptScene) answer(a *add) {
	for {
		in, _ := k.c.Enter(k.epochs[0].Start().UnixNano(), 0, 1)
		verdicts := []Verdict{Turned}
		a.epoch = int(in.Serial()) - 1
		_ = k.m.AddMany(in.Epoch, []Item{{Key: a.key}}, verdicts)
		leaveScene(in, verdicts[0])
		if a.verdict = verdicts[0]; a.verdict != Turned {
			a.done = true
			return
		}
		k.c.TurnFrom(in.Epoch)
	}
}

// TestInterleavingsOfReuse: the segments of a published epoch are used again two epochs later,
// and those of the epoch in between are not.
func TestInterleavingsOfReuse(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(0, 1, 2), func(r *explore.Run) {
		k := newKept(r, 3)
		key := kinds[0].key
		for n := range uint64(5) { // both chunks
			k.set(0, key(2*n, n))
		}
		k.published.Store(5 + 1)
		for n := range uint64(5) { // those of the next segment
			k.set(1, key(2*n+1, n))
		}
		k.adds(r, "last", 2, key(1, 21), key(1, 22))
		k.adds(r, "last too", 2, key(1, 22), key(3, 23))
		r.Go("closer", func() { k.epochs[0].State.Retire() })
		r.Check(k.check)
	})
}
