//go:build interleavings && unix

package dedup

import (
	"errors"
	"fmt"
	"testing"

	"verve/internal/explore"
)

// attempt is one attempt to count an id, with the same token as the others of its scene.
type attempt struct {
	verdict Verdict
	done    bool
}

var attemptOptions = &Options{Token: []byte("token")}

// tries starts a thread that tries to count key as the server does: if the epoch has turned, it
// tries again in the open one.
func (s *scene) tries(r *explore.Run, name string, key Key, a *attempt) {
	r.Go(name, func() {
		for {
			in, _ := s.c.Enter(s.epochs[0].Start().UnixNano(), 0, 1)
			verdicts := []Verdict{Turned}
			_ = s.m.AddMany(in.Epoch, []Item{{Key: key, Options: attemptOptions}}, verdicts)
			if verdicts[0] == Unique {
				in.Leave(1, 0, 0)
			} else {
				in.Leave(0, 0, 1)
			}
			explore.Note("%s: verdict %d in epoch %d", name, verdicts[0], in.Serial())
			if verdicts[0] != Turned {
				a.verdict, a.done = verdicts[0], true
				return
			}
			s.c.TurnFrom(in.Epoch)
		}
	})
}

// renewTables gives the next epoch tables of its own, so that an attempt cannot find out from
// words in a table that its epoch is over.
func (s *scene) renewTables() {
	narrow, err := newTable[narrowBucket](0, s.m.arena)
	if err != nil {
		panic(err)
	}
	wide, err := newTable[wideBucket](0, s.m.arena)
	if err != nil {
		panic(err)
	}
	s.m.narrow.next, s.m.wide.next = narrow, wide
}

// tryTwice adds two attempts to count one id with one token.
func (s *scene) tryTwice(r *explore.Run, key Key) *[2]attempt {
	attempts := new([2]attempt)
	for i := range attempts {
		s.tries(r, fmt.Sprint("attempt ", i), key, &attempts[i])
	}
	return attempts
}

// oneCounts returns an error unless one of two attempts counts and the other is its replay.
func oneCounts(attempts *[2]attempt) error {
	a, b := attempts[0].verdict, attempts[1].verdict
	if (a == Unique) == (b == Unique) || max(a, b) != Replayed && max(a, b) != ReplayedBefore {
		return fmt.Errorf("the attempts were answered %d and %d", a, b)
	}
	return nil
}

// TestInterleavingsOfAttempts: two attempts to count one id with one token, while the epoch
// turns. One counts, the other is its replay.
func TestInterleavingsOfAttempts(t *testing.T) {
	eachKind(t, explore.OptionsFor(1, 2, 3), func(r *explore.Run, kind kind) {
		s := newScene(Config{}, 1, 1)
		s.renewTables()
		first := s.epochs[0]
		attempts := s.tryTwice(r, kind.key(7, 1))
		r.Go("turn", func() { s.c.TurnFrom(first) })
		r.Check(func() error {
			return oneCounts(attempts)
		})
	})
}

// TestInterleavingsOfSieves: the same, and after the turn the cleaner fills the sieves of the
// next epoch, which the second attempt may use.
func TestInterleavingsOfSieves(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(1, 2, 2), func(r *explore.Run) {
		s := newScene(Config{}, 1, 1)
		s.renewTables()
		first := s.epochs[0]
		attempts := s.tryTwice(r, kinds[0].key(7, 1))
		r.Go("turn and cleaner", func() {
			s.c.TurnFrom(first)
			if _, err := s.m.current.Load().tokens.level(s.m, 0); err != nil {
				panic(err)
			}
			s.m.sift()
		})
		r.Check(func() error {
			if err := oneCounts(attempts); err != nil {
				return err
			}
			if !s.m.current.Load().tokens.sieved.Load() {
				return errors.New("the sieves were not filled")
			}
			return nil
		})
	})
}

// TestInterleavingsOfAttemptsKilled: the same, and the process is killed anywhere. The next
// one has the id once or not at all, with its token; it has it if an attempt was answered.
func TestInterleavingsOfAttemptsKilled(t *testing.T) {
	eachKind(t, explore.OptionsFor(0, 1, 2), func(r *explore.Run, kind kind) {
		k := newKept(r, 1)
		first, key := k.epochs[0], kind.key(7, 1)
		attempts := k.tryTwice(r, key)
		r.Go("turn", func() { k.c.TurnFrom(first) })
		r.Check(func() error {
			f, err := k.recall()
			if err != nil {
				return err
			}
			defer letGo(f.Memory)
			records := uint64(0)
			for _, l := range f.journal.counts {
				records += l.sum()
			}
			word := f.secret.tokenWord(key, attemptOptions.Token)
			has := f.recalled.tokens.has(word) || f.recalled.past.has(word)
			answered := attempts[0].done || attempts[1].done
			if records > 1 || answered && records == 0 || has != (records == 1) {
				return fmt.Errorf("%d records; the token is there: %t; an attempt was answered: %t", records, has, answered)
			}
			return nil
		})
	})
}

// TestInterleavingsOfTokens: two ids with tokens make the table of tokens, one of them while
// its retry is judged.
func TestInterleavingsOfTokens(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(1, 2, 3), func(r *explore.Run) {
		s := newScene(Config{}, 1, 1)
		var attempts [3]attempt
		for i, id := range []uint64{1, 1, 2} {
			s.tries(r, fmt.Sprint("attempt ", i), kinds[0].key(7, id), &attempts[i])
		}
		r.Check(func() error {
			a, b, c := attempts[0].verdict, attempts[1].verdict, attempts[2].verdict
			if min(a, b) != Unique || max(a, b) != Replayed || c != Unique {
				return fmt.Errorf("the attempts were answered %d, %d and %d", a, b, c)
			}
			if depth := s.epochs[0].State.(*View).tokens.table.depth; depth != 1 {
				return fmt.Errorf("the tokens have %d levels, want 1", depth)
			}
			return nil
		})
	})
}

// TestInterleavingsOfTheLastKey: there is room for one key. Two requests have an id under that
// key, and both ids are counted; a third id under another key is not counted, unless it comes
// first.
func TestInterleavingsOfTheLastKey(t *testing.T) {
	explore.Explore(t, explore.OptionsFor(2, 2, explore.All), func(r *explore.Run) {
		s := newKeyScene(Config{}, 1, 1, 1)
		names := []string{"a", "a", "b"}
		verdicts := make([]Verdict, len(names))
		for i, name := range names {
			r.Go(fmt.Sprint("under ", name), func() {
				item := Item{Key: kinds[1].key(2*uint64(i), uint64(i)), Options: &Options{Under: []byte(name)}}
				_ = s.m.AddMany(s.epochs[0], []Item{item}, verdicts[i:i+1]) // the verdict shows the error
			})
		}
		r.Check(func() error {
			counts := s.epochs[0].Keys().Counts().List()
			want := map[string]uint64{}
			for i, name := range names {
				if verdicts[i] == Unique {
					want[name]++
				}
			}
			if len(counts) != 1 || len(want) != 1 || counts[0].Unique != want[counts[0].Key] ||
				counts[0].Key == "a" && want["a"] != 2 {
				return fmt.Errorf("the answers are %v, the counts %v", verdicts, counts)
			}
			return nil
		})
	})
}
