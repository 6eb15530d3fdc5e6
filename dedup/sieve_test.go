//go:build linux

package dedup

import (
	"fmt"
	"math/bits"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"verve/counter"
)

// TestOriginOfAWord: from the bucket and the word of any token in any level, the x of its
// search can be computed.
func TestOriginOfAWord(t *testing.T) {
	m := newMemory(t, Config{Heap: true})
	var table table[narrowBucket]
	defer func() { table.free(m.arena) }()
	for _, n := range []uint64{minBuckets, minBuckets + 1, 9999, 1 << 16} {
		if err := table.extend(n, m.arena, false); err != nil {
			t.Fatal(err)
		}
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 100_000 {
		x := rnd.Uint64() >> (rnd.Uint64() % 64)
		if rnd.Uint64()%2 == 0 {
			x = ^x
		}
		at := x
		for i := range table.depth {
			l := table.levels[i].Load()
			_, rest := l.choose(at)
			bucket, _ := bits.Mul64(at, uint64(len(l.buckets))) // as level.choose
			if got := table.origin(i, bucket, rest|tokenTag); got != x {
				t.Fatalf("%#x in level %d, bucket %d: got %#x back", x, i, bucket, got)
			}
			at = l.next(at)
		}
	}
}

// siftedMemory returns a Memory that has the tokens of ids ids in one window, whose next window
// is open, and whose sieves are filled.
func siftedMemory(t *testing.T, ids int, change func(past *tokens)) (*Memory, *View, counter.Entry) {
	m := newMemory(t, Config{Heap: true})
	e := newEpochs(t, m)
	var entry counter.Entry
	for n := range 2 {
		in, _ := e.Counter.Enter(e.At(n), 0, 1)
		entry = in
		for id := range ids {
			if n == 1 {
				id = ids // one token, which makes the table
			}
			if v, err := addOptions(m, in.Epoch, fmt.Sprint(id), "", "a token"); v != Unique || err != nil {
				t.Fatalf("id %d: got %v, %v", id, v, err)
			}
			if n == 1 {
				break
			}
		}
		if n == 0 {
			in.Leave(0, 0, 1)
		}
	}
	t.Cleanup(func() { entry.Leave(0, 0, 1) })
	v := entry.State.(*View)
	change(v.past)
	m.sift()
	return m, v, entry
}

// TestSievesKnowEveryTokenOfTheWindowBefore: also those in further levels. Few other tokens
// pass.
func TestSievesKnowEveryTokenOfTheWindowBefore(t *testing.T) {
	const ids = 60_000
	m, v, in := siftedMemory(t, ids, func(past *tokens) {
		if past.table.depth < 2 {
			t.Fatal("the tokens have one level; want more")
		}
	})
	if !v.tokens.sieved.Load() {
		t.Fatal("the sieves were not filled")
	}
	passed := 0
	for id := range 2 * ids {
		k := m.secret.key(fmt.Append(nil, id))
		may := v.tokens.mayBePast(m.secret.tokenWord(k, []byte("a token")))
		if id < ids && !may {
			t.Fatalf("the token of id %d is not in a sieve", id)
		}
		if id >= ids && may {
			passed++
		}
	}
	if passed > ids/4 {
		t.Errorf("%d of %d other tokens pass the sieves", passed, ids)
	}
	for _, id := range []int{0, ids / 2, ids - 1} {
		if v, err := addOptions(m, in.Epoch, fmt.Sprint(id), "", "a token"); v != ReplayedBefore || err != nil {
			t.Errorf("the retry of id %d: got %v, %v", id, v, err)
		}
	}
}

// TestSievesAreNotUsedWithoutAllTokens: with tokens outside the table, too many tokens or too
// large further levels, every token is looked up in the window before.
func TestSievesAreNotUsedWithoutAllTokens(t *testing.T) {
	for name, change := range map[string]func(*tokens){
		"spilled":           func(past *tokens) { past.spills.Store(true) },
		"too many":          func(past *tokens) { past.sample.Store(2*sieveMost*minBuckets/sampleEvery + 1) },
		"in further levels": func(past *tokens) { past.table.slots *= 3 },
	} {
		_, v, _ := siftedMemory(t, 10, change)
		if v.tokens.sieved.Load() {
			t.Errorf("%s: the sieves are used", name)
		}
	}
}

// TestTokensOfAKilledProcessAreInTheSieves: a start puts them into a table, and the sieves of the
// next window have all of them.
func TestTokensOfAKilledProcessAreInTheSieves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const ids = 300
		cfg, l := small(t.TempDir()), newFakeSpool(t)
		p := live(t, cfg, time.Minute, l)
		for id := range ids {
			if v, _, err := p.with(time.Now(), fmt.Sprint(id), "", "a token"); v != Unique || err != nil {
				t.Fatal(v, err)
			}
		}
		p.kill()
		p = live(t, cfg, time.Minute, l)
		later := time.Now().Add(time.Minute)
		if v, _, err := p.with(later, "new", "", "a token"); v != Unique || err != nil {
			t.Fatal(v, err)
		}
		p.m.sift()
		if !p.m.current.Load().tokens.sieved.Load() {
			t.Error("the sieves are not used")
		}
		for id := range ids {
			if v, _, err := p.with(later, fmt.Sprint(id), "", "a token"); v != ReplayedBefore || err != nil {
				t.Errorf("the retry of id %d: got %v, %v", id, v, err)
			}
		}
		p.kill()
	})
}
