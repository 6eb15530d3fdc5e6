//go:build interleavings

package dedup

import (
	"fmt"
	"testing"
	"unsafe"

	"github.com/anishathalye/porcupine"

	"verve/internal/explore"
)

// question is a call of the set: to add a key to an epoch, or to look up whether the epoch has
// it.
type question struct {
	epoch int
	key   Key
	look  bool
}

// unknown is the answer if a key that is looked up is not known; if it is known, the answer is
// Repeat.
const unknown = Verdict(Verdicts)

// history has the questions and answers, and the steps at which they were asked and given.
type history []porcupine.Operation

// asks starts a thread that asks one question after the other. Asking and getting the answer
// are steps of their own, whose order matters: otherwise an order in which an answer comes
// before another question could be treated as equivalent to one in which the two overlap.
func (s *scene) asks(r *explore.Run, h *history, client int, questions ...question) {
	r.Go(fmt.Sprint("client ", client), func() {
		for _, q := range questions {
			explore.Do(explore.Read, "ask", unsafe.Pointer(h))
			asked := explore.Step()
			answer := unknown
			if !q.look {
				answer = s.judge(q.epoch, q.key)[0]
			} else if s.knows(q.epoch, q.key) {
				answer = Repeat
			}
			explore.Do(explore.Add, "answered", unsafe.Pointer(h))
			explore.Note("epoch %d, key %x: %d", q.epoch, q.key.lo, answer)
			*h = append(*h, porcupine.Operation{
				ClientId: client, Input: q, Output: answer, Call: int64(asked), Return: int64(explore.Step()),
			})
		}
	})
}

// sequentialSet is a set that answers one question after the other: it has a key in an epoch or
// not. In an epoch that is not the last one it may refuse a key, and forget keys that it has.
func sequentialSet(last int) porcupine.Model {
	return porcupine.Model{
		Partition: func(all []porcupine.Operation) (parts [][]porcupine.Operation) {
			of := map[question][]porcupine.Operation{}
			for _, o := range all {
				q := o.Input.(question)
				q.look = false
				of[q] = append(of[q], o)
			}
			for _, part := range of {
				parts = append(parts, part)
			}
			return parts
		},
		Init: func() any { return false },
		Step: func(state, input, output any) (bool, any) {
			has, q := state.(bool), input.(question)
			switch output.(Verdict) {
			case Unique:
				return !has, true
			case Repeat:
				return has, true
			case unknown:
				return !has || q.epoch < last, has
			default:
				return q.epoch < last, has
			}
		},
	}
}

// explained checks that there is an order of the questions in which a sequential set gives the
// same answers, and in which a question that was answered before another was asked comes before
// that one.
func (s *scene) explained(h *history) error {
	if !porcupine.CheckOperations(sequentialSet(len(s.epochs)-1), *h) {
		return fmt.Errorf("no sequential set gives these answers: %+v", *h)
	}
	return nil
}

// TestInterleavingsOfASet: two writers of one key, a writer of a key whose home is the same
// slot, and a reader.
func TestInterleavingsOfASet(t *testing.T) {
	eachKind(t, explore.OptionsFor(2, 3, explore.All), func(r *explore.Run, kind kind) {
		s, h := newScene(Config{}, 1, 1), new(history)
		a, b := question{key: kind.key(7, 1)}, question{key: kind.key(7, 2)}
		s.asks(r, h, 0, a)
		s.asks(r, h, 1, b, a)
		s.asks(r, h, 2, look(a), look(a))
		r.Check(func() error { return s.explained(h) })
	})
}

func look(q question) question {
	q.look = true
	return q
}

// TestInterleavingsOfASetThatTurns: a writer and a reader of an epoch, and those of the next
// one, which takes the slots.
func TestInterleavingsOfASetThatTurns(t *testing.T) {
	eachKind(t, explore.OptionsFor(2, 3, explore.All), func(r *explore.Run, kind kind) {
		s, h := newScene(Config{}, lap, 2), new(history)
		a, b := kind.key(7, 1), kind.key(7, 2)
		s.asks(r, h, 0, question{key: a}, question{key: a})
		s.asks(r, h, 1, question{epoch: 1, key: b}, question{epoch: 1, key: a, look: true})
		s.asks(r, h, 2, question{epoch: 1, key: a}, question{epoch: 1, key: a, look: true})
		r.Check(func() error { return s.explained(h) })
	})
}
