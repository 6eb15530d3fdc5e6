package dedup

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"verve/counter"
	"verve/internal/epochtest"
)

// families returns ids with structure: kinds that clients send, and kinds that an attacker
// would try who knows the code but not the secret.
func families() map[string]func(i uint64) []byte {
	f := map[string]func(i uint64) []byte{}
	decimal := func(name string, number func(i uint64) uint64) {
		f["decimal/"+name] = func(i uint64) []byte { return strconv.AppendUint(nil, number(i), 10) }
	}
	uuid := func(name string, halves func(i uint64) (hi, lo uint64)) {
		f["uuid/"+name] = func(i uint64) []byte {
			var b [16]byte
			hi, lo := halves(i)
			binary.BigEndian.PutUint64(b[:], hi)
			binary.BigEndian.PutUint64(b[8:], lo)
			id := make([]byte, 0, uuidLen)
			for i, part := range [][]byte{b[:4], b[4:6], b[6:8], b[8:10], b[10:]} {
				if i > 0 {
					id = append(id, '-')
				}
				id = hex.AppendEncode(id, part)
			}
			return id
		}
	}
	for shift := 0; shift <= 64-floodBits; shift += 4 {
		decimal(fmt.Sprintf("i<<%02d", shift), func(i uint64) uint64 { return i << shift })
		uuid(fmt.Sprintf("i<<%02d, 0", shift), func(i uint64) (uint64, uint64) { return i << shift, 0 })
		uuid(fmt.Sprintf("0, i<<%02d", shift), func(i uint64) (uint64, uint64) { return 0, i << shift })
		uuid(fmt.Sprintf("i<<%02d twice", shift), func(i uint64) (uint64, uint64) { return i << shift, i << shift })
	}
	const noon = 1_764_000_000_000 // ms
	decimal("multiples of 2^32", func(i uint64) uint64 { return i << 32 })
	decimal("fixed prefix", func(i uint64) uint64 { return 7_700_000_000_000_000_000 + i })
	decimal("thousands", func(i uint64) uint64 { return 1_000_000_000_000 + i*1000 })
	decimal("reversed bits", bits.Reverse64)
	decimal("reversed bytes", bits.ReverseBytes64)
	decimal("gray code", func(i uint64) uint64 { return i ^ i>>1 })
	decimal("two halves alike", func(i uint64) uint64 { return i<<32 | i })
	decimal("grid", func(i uint64) uint64 { return i%256<<56 | i/256 })
	decimal("snowflake, one per ms", func(i uint64) uint64 { return (noon+i)<<22 | 5<<17 | 3<<12 })
	decimal("snowflake, bursts", func(i uint64) uint64 { return (noon+i/64)<<22 | 7<<12 | i%64 })
	decimal("snowflake, workers", func(i uint64) uint64 { return (noon+i/32)<<22 | i%32<<12 })
	uuid("version 7, counted", func(i uint64) (uint64, uint64) { return (noon+i/64)<<16 | 7<<12 | i%64, 2 << 62 })
	uuid("version 1", func(i uint64) (uint64, uint64) { return (i*9973)<<32 | 0x11ef, 0x9a3c<<48 | 0x0242ac120002 })
	uuid("reversed bits", func(i uint64) (uint64, uint64) { return bits.Reverse64(i), 0 })
	uuid("grid", func(i uint64) (uint64, uint64) { return i % 256 << 56, i / 256 })
	f["text/fixed prefix"] = func(i uint64) []byte { return fmt.Appendf(nil, "user-%d", i) }
	f["text/padded"] = func(i uint64) []byte { return fmt.Appendf(nil, "%0250d", i) }

	// These would fill one bucket after another if this were the secret.
	wrong := newSecret()
	decimal("collide under a wrong secret", wrong.gather)
	decimal("differ under a wrong secret in high bits", func(i uint64) uint64 { return wrong.gather(i << (64 - floodBits)) })
	uuid("collide under a wrong secret", func(i uint64) (uint64, uint64) { return wrong.gather128(i, 0) })
	uuid("collide in both words under a wrong secret", func(i uint64) (uint64, uint64) { return wrong.gather128(0, i) })
	return f
}

const floodBits = 17 // bits of i: 131072 ids, more than a table of nearSlots slots is made for

// flooded is the state of a table after an epoch of one family.
type flooded struct {
	deep   float64 // share of the ids that found their first bucket full
	levels int
	bytes  uint64
	load   float64 // sampled load, of the true one
}

func flood(t *testing.T, id func(i uint64) []byte) flooded {
	t.Helper()
	const ids = 1 << floodBits
	m, err := NewMemory(Config{Expect: ids, ExpectWide: ids, Heap: raceEnabled})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	c, err := counter.New(counter.Config{Window: counter.MaxWindow, Store: m, Publisher: epochtest.Nobody{}})
	if err != nil {
		t.Fatal(err)
	}
	e := c.Last()
	defer e.State.Retire()
	for i := range uint64(ids) {
		if v, err := addTo(m, e, id(i)); v != Unique || err != nil {
			t.Fatalf("id %s: got %v, %v; want Unique", id(i), v, err)
		}
	}
	s, l := m.Stats(), m.current.Load().load()
	inFirst := 0
	for i := range m.narrow.open.levels[0].Load().buckets {
		inFirst += tagged(m.narrow.open.levels[0].Load().buckets[i][:], m.current.Load().tag)
	}
	for i := range m.wide.open.levels[0].Load().buckets {
		for slot := range slotsPerBucket {
			inFirst += tagged(m.wide.open.levels[0].Load().buckets[i][slot][:1], m.current.Load().tag)
		}
	}
	return flooded{1 - float64(inFirst)/ids, s.Levels, s.Bytes, float64(l.narrow+l.wide) / ids}
}

// TestFloodingChangesNeitherMemoryNorLevels: whatever structure the ids have, the table looks
// as with random ids. Only chance may differ between the two: the share of ids in deeper levels
// is 2 % and varies by a few per cent of itself, the sampled load by as much.
func TestFloodingChangesNeitherMemoryNorLevels(t *testing.T) {
	if raceEnabled {
		t.Skip("one goroutine: nothing for the race detector")
	}
	rnd := rand.New(rand.NewPCG(5, 6))
	random := map[string]flooded{
		"decimal": flood(t, func(uint64) []byte { return strconv.AppendUint(nil, rnd.Uint64(), 10) }),
		"uuid":    flood(t, func(uint64) []byte { return fmt.Appendf(nil, "%016x", rnd.Uint64()) }), // text: hashed
	}
	random["text"] = random["uuid"]
	for kind, r := range random {
		t.Logf("random %s: %+v", kind, r)
	}
	for name, id := range families() {
		kind, _, _ := strings.Cut(name, "/")
		want := random[kind]
		got := flood(t, id)
		if got.deep > 1.3*want.deep || got.levels > want.levels || got.bytes > want.bytes || got.load < 0.85 || got.load > 1.15 {
			t.Errorf("%s: got %+v, random ids %+v", name, got, want)
		}
	}
}

// tagged counts the words of an epoch.
func tagged(words []atomic.Uint64, tag uint64) (n int) {
	for i := range words {
		if words[i].Load()&tagMask == tag {
			n++
		}
	}
	return n
}
