package redis

import (
	"math/rand/v2"
	"strconv"
	"testing"

	"verve/dedup"
	"verve/internal/settest"
)

// TestPendingIDsAreAMap compares them with one, through growth, with ids that
// share a bucket and with one id in two epochs.
func TestPendingIDsAreAMap(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	local, err := dedup.NewMemory(dedup.Config{Heap: true})
	if err != nil {
		t.Fatal(err)
	}
	settest.NewEpochs(t, local) // opens the epoch that Keys looks at
	epochs := []*redisEpoch{{}, {}}
	random := func() pendingKey {
		id := strconv.Itoa(rnd.IntN(6000))
		if rnd.IntN(2) == 0 {
			id += "-text"
		}
		items := []dedup.Item{{ID: []byte(id)}}
		local.Keys(items)
		return pendingKey{epochs[rnd.IntN(2)], items[0].Key}
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
