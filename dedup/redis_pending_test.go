package dedup

import (
	"math/rand/v2"
	"testing"
)

// TestPendingIDsAreAMap compares them with one, through growth, with ids that
// share a bucket and with one id in two epochs.
func TestPendingIDsAreAMap(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	epochs := []*redisEpoch{{}, {}}
	random := func() pendingKey {
		k := Key{lo: rnd.Uint64N(3000), kind: narrowKind} // high bits alike: one chain
		if n := rnd.IntN(3000); n%3 > 0 {
			k = Key{hi: uint64(n % 7), lo: uint64(n) * 0x9e3779b97f4a7c15, kind: wideKind}
		}
		return pendingKey{epochs[rnd.IntN(2)], k}
	}
	var p pendingIDs
	want := map[pendingKey]*entry{}
	for range 50_000 {
		k := random()
		en := p.find(k)
		if en != want[k] {
			t.Fatalf("found %p, want %p", en, want[k])
		}
		switch {
		case en == nil:
			en = &entry{key: k}
			p.add(en)
			want[k] = en
		case rnd.IntN(3) == 0:
			p.remove(en)
			delete(want, k)
		}
		if p.n != len(want) {
			t.Fatalf("%d entries, want %d", p.n, len(want))
		}
	}
	if len(p.buckets) <= pendingMin {
		t.Errorf("%d buckets: they never grew", len(p.buckets))
	}
	for k, en := range want {
		if p.find(k) != en {
			t.Fatal("an entry is not found at the end")
		}
	}
}
