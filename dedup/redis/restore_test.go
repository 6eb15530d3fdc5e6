package redis

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// TestLogHasWhatCameAfterABatch compares it with a plain list, through losses and what is added
// again after them.
func TestLogHasWhatCameAfterABatch(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	r := &Set{cfg: Config{logBytes: 1 << 30}}
	type added struct {
		seq uint64
		id  string
	}
	var le laneEpoch
	var have []added // that Redis has
	var todo []string
	seq := uint64(0)
	for n := range 5000 {
		var en entry
		id := strings.Repeat("x", rnd.IntN(40)) + fmt.Sprint("-", n)
		en.enc.encode(r.hashKey, false, []byte(id))
		packed := string(en.enc.bytes()[1:])
		switch k := rnd.IntN(20); {
		case k < 12:
			seq += uint64(rnd.IntN(2))
			le.applied(r, seq, &en)
			have = append(have, added{seq, packed})
		case k < 16:
			le.log.unsent(r, en.enc.bytes())
			todo = append(todo, packed)
		case k < 17:
			kept := seq - min(seq, uint64(rnd.IntN(30)))
			le.log.rewind(kept)
			i, _ := slices.BinarySearchFunc(have, kept+1, func(a added, seq uint64) int { return int(a.seq) - int(seq) })
			var again []string
			for _, a := range have[i:] {
				again = append(again, a.id)
			}
			todo, have = append(again, todo...), have[:i]
		default:
			seq++
			ids, size := le.log.next(7)
			want := todo[:min(7, len(todo))]
			got := ""
			for _, list := range ids {
				got += list
			}
			if sent := le.log.sent(seq, size); sent != len(want) || len(got) != len(strings.Join(want, "")) {
				t.Fatalf("%d ids, %d bytes, are added again, want %q", sent, len(got), want)
			}
			for _, id := range want {
				if !strings.Contains(got, id) {
					t.Fatalf("%q is not added again", id)
				}
				have = append(have, added{seq, id})
			}
			todo = todo[len(want):]
		}
		if countIDs(le.log.todo) != len(todo) {
			t.Fatalf("%d ids are to be added again, want %d", countIDs(le.log.todo), len(todo))
		}
	}
	if n := r.logBytes.Load(); n != int64(le.log.size) {
		t.Errorf("%d bytes are noted, the log has %d", n, le.log.size)
	}
}
