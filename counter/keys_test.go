package counter

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

func keysOf(most int) *Keys { return &Keys{max: most, memory: new(keyMemory)} }

// add counts one id under a key, as a Store does. The hash is a bad one, so that keys collide.
func add(ks *Keys, name string) bool {
	hash := uint64(len(name))<<32 | uint64(name[len(name)-1])
	for _, c := range []byte(name) {
		hash = hash*31 + uint64(c)
	}
	k := ks.Find(hash, []byte(name))
	if k == nil {
		k = ks.Add(hash, []byte(name))
	}
	if k != nil {
		ks.Count(k, 1)
	}
	return k != nil
}

// TestKeysAddUpUnderContention: if workers add the same new keys at the same time, no count is
// lost, and each name becomes one key.
func TestKeysAddUpUnderContention(t *testing.T) {
	const names, each = 3000, 8
	ks := keysOf(names)
	var all sync.WaitGroup
	for range each {
		all.Go(func() {
			for i := range names {
				if !add(ks, fmt.Sprint("key-", i)) {
					t.Errorf("no room for key %d of %d", i, names)
				}
			}
		})
	}
	all.Wait()
	counts := ks.Counts().List()
	if len(counts) != names || ks.Len() != names {
		t.Fatalf("got %d counts of %d keys, want %d", len(counts), ks.Len(), names)
	}
	seen := map[string]bool{}
	for _, c := range counts {
		if c.Unique != each || seen[c.Key] {
			t.Fatalf("got %+v, want each key once and with %d ids", c, each)
		}
		seen[c.Key] = true
	}
}

// TestKeysAreBounded: only as many names as the bound allows become keys, and these keys go on
// counting.
func TestKeysAreBounded(t *testing.T) {
	const most = 100
	ks := keysOf(most)
	var in atomic.Int64
	var all sync.WaitGroup
	for w := range 4 {
		all.Go(func() {
			for i := range 1000 {
				if add(ks, fmt.Sprintf("flood-%d-%d", w, i)) {
					in.Add(1)
				}
			}
		})
	}
	all.Wait()
	if in.Load() != most || ks.Len() != most || !ks.Full() {
		t.Fatalf("%d keys are in, Len is %d, want %d", in.Load(), ks.Len(), most)
	}
	name := ks.Counts().List()[0].Key
	if !add(ks, name) || ks.Counts().Largest(1)[0] != (KeyCount{name, 2}) {
		t.Errorf("got %+v, want %s with 2 ids", ks.Counts().Largest(1), name)
	}
}

// TestNamesOfOneHashAreNotMixed: the second of two names with the same hash is refused.
func TestNamesOfOneHashAreNotMixed(t *testing.T) {
	ks := keysOf(10)
	a := ks.Add(7, []byte("a"))
	ks.Count(a, 1)
	if b := ks.Add(7, []byte("b")); b != nil || ks.Find(7, []byte("b")) != nil || ks.Find(7, []byte("a")) != a || ks.Len() != 1 {
		t.Errorf("got %v for the second name, %d keys", b, ks.Len())
	}
}

// TestMemoryOfKeysIsBoundedOverEpochs: all epochs that wait to be published share one bound,
// and each gives its part back.
func TestMemoryOfKeysIsBoundedOverEpochs(t *testing.T) {
	memory := keyMemory{limit: 1 << 20}
	flood := func(ks *Keys) (n int) {
		for n < 100_000 && add(ks, fmt.Sprint("key-", n)) {
			n++
		}
		return n
	}
	first, second := Keys{max: 1 << 20, memory: &memory}, Keys{max: 1 << 20, memory: &memory}
	had := flood(&first)
	if had < 1000 || had > 10_000 || !first.Full() || memory.used.Load() > memory.limit+memory.limit/4 {
		t.Fatalf("%d keys in %d bytes, want a mebibyte", had, memory.used.Load())
	}
	if n := flood(&second); n > 0 || !add(&first, "key-0") {
		t.Errorf("another epoch got %d keys, or those that are in count no more", n)
	}
	first.release(false)
	second.release(false)
	if memory.used.Load() != 0 {
		t.Errorf("%d bytes are left", memory.used.Load())
	}
	third := Keys{max: 1 << 20, memory: &memory}
	if n := flood(&third); n != had {
		t.Errorf("got %d keys after the memory was given back, %d before", n, had)
	}
}

// TestTableOfKeysIsUsedAgain: an epoch that reuses the memory of a released one does not have
// its keys, and names of all lengths stay whole.
func TestTableOfKeysIsUsedAgain(t *testing.T) {
	const names = 5000
	name := func(epoch, i int) string {
		text := fmt.Sprintf("%d-%d-", epoch, i)
		return text + strings.Repeat("x", i%(MaxKeyLen+1-len(text)))
	}
	var memory keyMemory
	var table *keyTable
	for epoch := range 3 {
		ks := &Keys{max: names, memory: &memory}
		if epoch > 0 {
			ks.prepare(names)
			if ks.table.Load() != table || ks.Counts().Len() > 0 {
				t.Fatalf("epoch %d has another table, or %d keys of the one before", epoch, ks.Counts().Len())
			}
		}
		want := map[string]uint64{}
		for i := range names {
			if !add(ks, name(epoch, i)) {
				t.Fatalf("no room for key %d", i)
			}
			want[name(epoch, i)]++
		}
		got := map[string]uint64{}
		counts := ks.Counts()
		table = ks.table.Load()
		ks.release(false)
		for _, c := range counts.List() { // they are copies
			got[c.Key] += c.Unique
		}
		if !maps.Equal(got, want) {
			t.Fatalf("epoch %d: got %d names, want %d, each with one id", epoch, len(got), len(want))
		}
		ks.CountLate(1, []byte("late"))
		if add(ks, "late") || ks.Counts().Len() > 0 || memory.used.Load() != 0 {
			t.Errorf("an epoch that is released has keys, or %d bytes", memory.used.Load())
		}
	}
	late := &Keys{max: names, memory: &memory}
	late.release(false)
	if late.prepare(names); memory.used.Load() != 0 || late.table.Load() != nil {
		t.Errorf("an epoch that was closed before it was prepared takes %d bytes", memory.used.Load())
	}
	(&Keys{max: names, memory: &memory}).release(false)
	if memory.free.Load() != nil {
		t.Error("an epoch without keys has left the table of an earlier one")
	}
}

// TestTableThatIsReadIsNotUsedAgain: a reader of the keys of an epoch that is being released
// finds these keys or none, but not those of the next epoch.
func TestTableThatIsReadIsNotUsedAgain(t *testing.T) {
	const names = 300
	var memory keyMemory
	for epoch := range 50 {
		ks := &Keys{max: names, memory: &memory}
		ks.prepare(names)
		for i := range names {
			add(ks, fmt.Sprint(epoch, "-", i))
		}
		var readers sync.WaitGroup
		for range 3 {
			readers.Go(func() {
				for n := names; n > 0; {
					counts := ks.Counts()
					for key := range counts.All() {
						if !bytes.HasPrefix(key, fmt.Append(nil, epoch, "-")) {
							t.Errorf("epoch %d has the key %q", epoch, key)
						}
					}
					n = counts.Len()
				}
			})
		}
		ks.release(false)
		next := &Keys{max: names, memory: &memory}
		next.prepare(names)
		for i := range names {
			add(next, fmt.Sprint("next-", i))
		}
		readers.Wait()
		next.release(false)
	}
	ks := &Keys{max: names, memory: &memory}
	add(ks, "a key")
	memory.free.Store(nil)
	ks.late.Add(1) // a reader
	ks.release(false)
	if memory.free.Load() != nil {
		t.Error("the table of a reader is to be used again")
	}
}

// TestLargestKeysAreThoseOfASort, whatever the order of the counts.
func TestLargestKeysAreThoseOfASort(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		counts := make([]KeyCount, rnd.IntN(200))
		for i := range counts {
			counts[i] = KeyCount{Key: fmt.Sprint(i), Unique: uint64(1 + rnd.IntN(30))}
		}
		want := slices.SortedFunc(slices.Values(counts), func(a, b KeyCount) int {
			return cmp.Or(cmp.Compare(b.Unique, a.Unique), strings.Compare(a.Key, b.Key))
		})
		n := 1 + rnd.IntN(20)
		got := KeyCountsOf(counts...).Largest(n)
		if want = want[:min(n, len(want))]; !slices.Equal(got, want) {
			t.Fatalf("got %v, want %v", got, want)
		}
	}
}
