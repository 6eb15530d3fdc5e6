//go:build unix

package bench

import (
	"encoding/hex"
	"math/rand/v2"
	"strconv"
	"syscall"
)

// kind is a form of ids.
type kind string

const (
	decimal kind = "decimal" // 18 to 20 digits, nearly all
	uuids   kind = "uuid"
	text    kind = "string"
)

// sizes are the expectations for n ids of the kind.
func (k kind) sizes(n int) Sizes {
	if k == decimal {
		return Sizes{Numbers: n}
	}
	return Sizes{Others: n}
}

// append writes the id numbered n: other numbers give other ids.
func (k kind) append(dst []byte, n uint64) []byte {
	word := mix(n)
	switch k {
	case uuids:
		var b [16]byte
		for i := range 8 {
			b[i], b[8+i] = byte(word>>(8*i)), byte(mix(^word)>>(8*i))
		}
		for i, part := range [][]byte{b[:4], b[4:6], b[6:8], b[8:10], b[10:]} {
			if i > 0 {
				dst = append(dst, '-')
			}
			dst = hex.AppendEncode(dst, part)
		}
		return dst
	case text:
		dst = append(dst, "user/"...)
		dst = strconv.AppendUint(dst, word, 36)
		return append(dst, "@example.org"...)
	}
	return strconv.AppendUint(dst, word, 10)
}

// stride is the place of an id on a tape: a byte for its length and the text.
func (k kind) stride() int {
	switch k {
	case uuids:
		return 40
	case text:
		return 32
	}
	return 24
}

// mix is the finaliser of SplitMix64, a bijection: ids look like drawn ones
// and are still different for different numbers.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// tape is a sequence of ids, made before the clock starts. It lies off the Go
// heap, where it would change when the garbage collector runs, and is read
// front to back, as cheaply as a request that has just arrived.
type tape struct {
	bytes   []byte
	stride  int
	length  int
	uniques int // different ids on it
}

// newTape writes the ids of the given numbers.
func newTape(k kind, length, uniques int, number func(i int) uint64) *tape {
	t := &tape{stride: k.stride(), length: length, uniques: uniques}
	var err error
	t.bytes, err = syscall.Mmap(-1, 0, length*t.stride, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		panic(err) // no memory for the benchmark
	}
	for i := range length {
		place := t.bytes[i*t.stride : (i+1)*t.stride]
		place[0] = byte(len(k.append(place[1:1], number(i))))
	}
	return t
}

func (t *tape) at(i int) []byte {
	place := t.bytes[i*t.stride : (i+1)*t.stride]
	return place[1 : 1+place[0]]
}

func (t *tape) free() { _ = syscall.Munmap(t.bytes) } // was mapped in newTape

// mixture is how new ids and repeats come.
type mixture string

const (
	unique mixture = "unique" // every id once
	half   mixture = "half"   // every second one a repeat
	dup99  mixture = "dup99"  // 99 of 100 repeats
)

// dupAdds is the least number of adds of dup99 that is worth timing.
const dupAdds = 1_000_000

// tapes returns the ids that are put in before the clock starts, nil for none,
// and those that are timed.
func tapes(k kind, m mixture, ids int) (before, timed *tape) {
	rnd := rand.New(rand.NewPCG(1, uint64(ids))) // the same for every design
	switch m {
	case half:
		return nil, newTape(k, 2*ids, ids, func(i int) uint64 {
			if i%2 == 0 {
				return uint64(i / 2)
			}
			return rnd.Uint64N(uint64(i/2) + 1)
		})
	case dup99:
		adds := max(ids, dupAdds)
		fresh := adds / 100
		there := uint64(ids - fresh)
		before = newTape(k, ids-fresh, ids-fresh, func(i int) uint64 { return uint64(i) })
		return before, newTape(k, adds, fresh, func(i int) uint64 {
			if i%100 == 0 {
				return there + uint64(i/100)
			}
			return rnd.Uint64N(there)
		})
	}
	return nil, newTape(k, ids, ids, func(i int) uint64 { return uint64(i) })
}

// shelf keeps the tapes of the last case: the designs are measured in turn on
// the same ones.
type shelf struct {
	kind          kind
	mix           mixture
	ids           int
	before, timed *tape
}

func (s *shelf) get(k kind, m mixture, ids int) (before, timed *tape) {
	if s.timed != nil && s.kind == k && s.mix == m && s.ids == ids {
		return s.before, s.timed
	}
	s.clear()
	s.kind, s.mix, s.ids = k, m, ids
	s.before, s.timed = tapes(k, m, ids)
	return s.before, s.timed
}

func (s *shelf) clear() {
	for _, t := range []*tape{s.before, s.timed} {
		if t != nil {
			t.free()
		}
	}
	*s = shelf{}
}
