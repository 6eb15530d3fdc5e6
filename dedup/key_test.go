package dedup

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"verve/internal/epochtest"
)

func FuzzDecimal(f *testing.F) {
	for _, id := range append(epochtest.Alike, "", "18446744073709551609", "18446744073709551610", "18446744073709551620",
		"19999999999999999999", "99999999999999999999", "100000000000000000000", "9999999999999999999", "1e3", "1_0", "-1", "0:", "/") {
		f.Add([]byte(id))
	}
	for length := 1; length <= 21; length++ { // each length is read with other words
		id := []byte("987654321098765432109"[:length])
		f.Add(id)
		for i := range id {
			for _, c := range []byte{'0', '/', ':', 'p', 0xb0, 0xff} {
				other := bytes.Clone(id)
				other[i] = c
				f.Add(other)
			}
		}
	}
	f.Fuzz(func(t *testing.T, id []byte) {
		n, ok := decimal(id)
		want, err := strconv.ParseUint(string(id), 10, 64)
		// A decimal is canonical if it is exactly what formatting the number gives.
		canonical := err == nil && strconv.FormatUint(want, 10) == string(id)
		if ok != canonical || ok && n != want {
			t.Errorf("decimal(%q) = %d, %t; want %d, %t", id, n, ok, want, canonical)
		}
	})
}

var canonicalUUID = regexp.MustCompile(`\A[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\z`)

func FuzzUUID(f *testing.F) {
	for _, id := range append(epochtest.Alike, "3f333df6-90a4-4fda-8dd3-9485d27cee3", "3f333df6-90a4-4fda-8dd3-9485d27cee3g",
		"3f333df6-90a4-4fda-8dd3-9485d27cee3\n", "3f333df6-90a4-4fda-8dd3-9485d27cee3\xff", "3f333df6-90a4-4fda-8dd3--485d27cee36",
		"3f333df6-90a4-4fda48dd3-9485d27cee36", "3f333df6-90a4-4fda-8dd349485d27cee36", "3f333df6-90a444fda-8dd3-9485d27cee36",
		"3f333df6490a4-4fda-8dd3-9485d27cee36", "3f333df-690a4-4fda-8dd3-9485d27cee36", "------------------------------------") {
		f.Add([]byte(id))
	}
	f.Fuzz(func(t *testing.T, id []byte) {
		hi, lo, ok := ParseUUID(id)
		if want := canonicalUUID.Match(id); ok != want {
			t.Fatalf("uuid(%q) is %t, want %t", id, ok, want)
		}
		if !ok {
			return
		}
		raw, err := hex.DecodeString(string(bytes.ReplaceAll(id, []byte("-"), nil)))
		if err != nil {
			t.Fatal(err)
		}
		if wantHi, wantLo := binary.BigEndian.Uint64(raw), binary.BigEndian.Uint64(raw[8:]); hi != wantHi || lo != wantLo {
			t.Errorf("uuid(%q) = %x, %x; want %x, %x", id, hi, lo, wantHi, wantLo)
		}
	})
}

// inverse returns the number that undoes a multiplication by odd, by Newton's method: each step
// doubles the number of correct bits.
func inverse(odd uint64) uint64 {
	x := odd
	for range 6 {
		x *= 2 - odd*x
	}
	return x
}

// gather undoes scatter.
func (s *secret) gather(x uint64) uint64 {
	x *= inverse(s.odd[4])
	x ^= x >> 32
	x *= inverse(s.odd[1])
	x ^= x >> 32
	return x*inverse(s.odd[0]) ^ s.xor[0]
}

// TestScatterIsOneToOne: scatter can be undone, so different keys stay different.
func TestScatterIsOneToOne(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 10_000 {
		s := newSecret()
		for _, k := range []uint64{0, 1, 1 << 63, ^uint64(0), rnd.Uint64()} {
			if got := s.gather(s.scatter(k)); got != k {
				t.Fatalf("scatter(%x) comes back as %x", k, got)
			}
			hi, lo := rnd.Uint64(), k
			if h, l := s.gather128(s.scatter128(hi, lo)); h != hi || l != lo {
				t.Fatalf("scatter128(%x, %x) comes back as %x, %x", hi, lo, h, l)
			}
			if h, l := s.gather128(s.scatter128(lo, hi)); h != lo || l != hi {
				t.Fatalf("scatter128(%x, %x) comes back as %x, %x", lo, hi, h, l)
			}
		}
	}
}

// TestIdsUnderKeysHaveTheirOwnPlaces: no two different pairs of key and id are treated as
// equal, however similar they look, and a pair has the same Key in every request.
func TestIdsUnderKeysHaveTheirOwnPlaces(t *testing.T) {
	m := newMemory(t, Config{})
	newEpochs(t, m)
	seen := map[Key]string{}
	for _, under := range []string{"", "a", "a1", "1", "12", "key", strings.Repeat("k", 128)} {
		for _, id := range []string{"0", "1", "11", "12", "112", "01", "1a", "18446744073709551615", "18446744073709551616", "6ba7b810-9dad-11d1-80b4-00c04fd430c8", strings.Repeat("x", 256)} {
			k := m.secret.keyOf([]byte(id), &Options{Under: []byte(under)})
			if other, there := seen[k]; there {
				t.Errorf("%s under %q has the key of %s", id, under, other)
			}
			seen[k] = fmt.Sprintf("%s under %q", id, under)
			shared := &Options{Under: []byte(under), Token: []byte("t")}
			m.secret.keyOf([]byte("another"), shared)
			if again := m.secret.keyOf([]byte(id), shared); again != k {
				t.Errorf("%s under %q has two keys", id, under)
			}
		}
	}
}
