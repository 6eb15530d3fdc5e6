package redis

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// TestLogBlocksAreWhatWasAppended compares them with plain bytes, around the ends
// of blocks too.
func TestLogBlocksAreWhatWasAppended(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var bs blocks
	var want []byte
	for range 2000 {
		b := make([]byte, rnd.IntN(100))
		if rnd.IntN(10) == 0 {
			b = make([]byte, blockBytes-len(want)%blockBytes+rnd.IntN(3)-1)
		}
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		bs.append(b)
		want = append(want, b...)
		if rnd.IntN(20) == 0 {
			n := rnd.IntN(len(want) + 1)
			switch rnd.IntN(3) {
			case 0:
				n -= n % blockBytes
			case 1:
				n = len(want)
			}
			if off := bs.cut(n); !bytes.Equal(off, want[n:]) {
				t.Fatalf("cut at %d of %d: %d bytes, want %d", n, len(want), len(off), len(want)-n)
			}
			want = want[:n]
		}
		if bs.len != len(want) {
			t.Fatalf("%d bytes, want %d", bs.len, len(want))
		}
	}
	if all := bs.cut(0); !bytes.Equal(all, want) || bs.len != 0 {
		t.Errorf("%d bytes, want %d, and none left", len(all), len(want))
	}
}
