package dedup

import (
	"bytes"
	"testing"
)

// TestWordsOfTokensDiffer: for each length, if any bit of the token, its id or the secret is
// changed, or a zero byte is appended.
func TestWordsOfTokensDiffer(t *testing.T) {
	s, k := newSecret(), Key{1 << 40, 7, wideKind}
	others := newSecret()
	have := map[uint64]bool{}
	differs := func(what string, n int, word uint64) {
		t.Helper()
		if have[word] {
			t.Errorf("%d bytes: the word does not change with %s", n, what)
		}
		have[word] = true
	}
	for n := 1; n <= 64; n++ {
		token := bytes.Repeat([]byte{'0'}, n)
		word := s.tokenWord(k, token)
		differs("the length", n, word)
		if again := s.tokenWord(k, bytes.Clone(token)); again != word {
			t.Errorf("%d bytes: got %x, then %x", n, word, again)
		}
		for i := range 8 * n {
			token[i/8] ^= 1 << (i % 8)
			differs("the token", n, s.tokenWord(k, token))
			token[i/8] ^= 1 << (i % 8)
		}
		if n < 64 {
			differs("a zero behind it", n, s.tokenWord(k, append(token, 0)))
		}
		for i := range 64 {
			differs("the id", n, s.tokenWord(Key{k.hi ^ 1<<i, k.lo, k.kind}, token))
			differs("the id", n, s.tokenWord(Key{k.hi, k.lo ^ 1<<i, k.kind}, token))
		}
		differs("the kind of the id", n, s.tokenWord(Key{k.hi, k.lo, pairKind}, token))
		differs("the secret", n, others.tokenWord(k, token))
	}
}

// TestBucketOfTokens: words go into all slots of a bucket except the sieves; from then on each
// of them is found, and no other.
func TestBucketOfTokens(t *testing.T) {
	const room = 2 * (lineSlots - 1)
	for first := range uint64(slotsPerBucket) {
		var b narrowBucket
		word := func(n uint64) uint64 { return first<<60 | n<<tagBits | tokenTag } // all begin in one line
		b[0].Store(word(room))
		b[lineSlots].Store(word(room))
		for n := range uint64(room) {
			if there, room := findIn(&b, word(n)); there || !room {
				t.Fatalf("word %d: there %t, room %t before it is put in", n, there, room)
			}
			if done, other := putIn(&b, word(n)); !done || other != (n >= room/2) {
				t.Fatalf("word %d: done %t, in the other line %t", n, done, other)
			}
			for i := range n + 1 {
				if there, _ := findIn(&b, word(i)); !there {
					t.Fatalf("word %d is lost when %d are in", i, n+1)
				}
			}
		}
		if there, room := findIn(&b, word(room)); there || room {
			t.Errorf("a full bucket: the sieve is a word: %t, there is room: %t", there, room)
		}
		if done, other := putIn(&b, word(room)); done || !other {
			t.Error("a full bucket takes another word")
		}
		if b[0].Load() != word(room) || b[lineSlots].Load() != word(room) {
			t.Error("a word is in the place of a sieve")
		}
	}
}
