package redis

import (
	"slices"
	"testing"

	"verve/dedup"
)

// retried stands in the table for Replayed if the attempt has a token, and else Repeat.
const retried = dedup.Verdict(255)

// steps are all pairs of a state and an event that do anything.
var steps = []struct {
	phase   phase
	alone   []bool
	waiting []audience
	events  []event
	next    state // phase, and alone or uncertain where the step sets it
	fx      effects
}{
	{queued, any2, anyWaits, []event{eventSent}, state{phase: flying}, effects{}},
	{queued, any2, anyWaits, []event{eventAnsweredAlone}, state{phase: finished}, effects{log: asUnsent}},
	{queued, any2, []audience{noRequest}, []event{eventAnsweredBeside}, state{phase: finished}, effects{}},

	{flying, any2, anyWaits, []event{eventAnsweredAlone}, state{phase: flying, alone: true}, effects{}},
	{flying, any2, anyWaits, []event{eventRefused}, state{phase: flying, uncertain: true}, effects{}},
	{flying, no, anyWaits, []event{eventSealed}, state{phase: finished}, effects{to: allAnswered, verdict: dedup.Turned}},
	{flying, yes, anyWaits, []event{eventSealed}, state{phase: finished}, effects{log: asUnsent, to: allAnswered, verdict: dedup.Turned}},
	{flying, yes, anyWaits, []event{eventAdded}, state{phase: finished}, effects{log: asTaken, to: thereAnswered, verdict: retried}},
	{flying, no, []audience{noRequest, otherAttempts}, []event{eventAdded}, state{phase: unanswered}, effects{}},
	{flying, no, []audience{itsAttempt}, []event{eventAdded}, state{phase: finished}, effects{log: asTaken, known: true, to: thereAnswered, verdict: dedup.Unique}},
	{flying, yes, anyWaits, append([]event{eventUndone}, notAdded...), state{phase: finished}, effects{log: asUnsent, to: thereAnswered, verdict: retried}},
	{flying, no, []audience{noRequest}, []event{eventUndone, eventInDoubt}, state{phase: finished}, effects{}},
	{flying, no, someWaits, []event{eventUndone, eventInDoubt}, state{phase: queued}, effects{}},
	{flying, no, []audience{noRequest}, []event{eventThere}, state{phase: finished}, effects{to: thereAnswered, verdict: dedup.Repeat}},
	{flying, no, someWaits, []event{eventThere}, state{phase: finished}, effects{known: true, to: thereAnswered, verdict: dedup.Repeat}},
	{flying, no, []audience{noRequest}, []event{eventThereAs}, state{phase: finished}, effects{to: thereAnswered, verdict: dedup.Replayed}},
	{flying, no, someWaits, []event{eventThereAs}, state{phase: finished}, effects{known: true, to: thereAnswered, verdict: dedup.Replayed}},
	{flying, no, anyWaits, []event{eventBefore}, state{phase: finished}, effects{to: attemptAnswered, verdict: dedup.ReplayedBefore}},
	{flying, no, anyWaits, []event{eventAfter}, state{phase: finished}, effects{to: attemptAnswered, verdict: dedup.ReplayedAfter}},
	{flying, no, anyWaits, []event{eventFull}, state{phase: finished}, effects{to: thereAnswered, verdict: dedup.Repeat, err: dedup.ErrFull}},
	{flying, no, anyWaits, []event{eventKeysFull}, state{phase: finished}, effects{to: thereAnswered, verdict: dedup.Repeat, err: dedup.ErrTooManyKeys}},

	{unanswered, any2, anyWaits, []event{eventSent}, state{phase: taking}, effects{}},
	{unanswered, any2, anyWaits, []event{eventAnsweredAlone}, state{phase: unanswered, alone: true}, effects{}},
	{unanswered, any2, anyWaits, []event{eventRefused}, state{phase: unanswered, uncertain: true}, effects{}},
	{unanswered, any2, anyWaits, []event{eventAskedAgain}, state{phase: finished}, effects{log: asTaken, known: true, to: thereAnswered, verdict: retried}},
	{unanswered, no, anyWaits, []event{eventSealed}, state{phase: finished}, effects{to: allAnswered, verdict: dedup.Turned}},
	{unanswered, yes, anyWaits, []event{eventSealed}, state{phase: finished}, effects{log: asUnsent, to: allAnswered, verdict: dedup.Turned}},
	{unanswered, yes, anyWaits, []event{eventGone}, state{phase: finished}, effects{log: asUnsent, to: thereAnswered, verdict: retried}},
	{unanswered, no, []audience{noRequest}, []event{eventGone}, state{phase: finished}, effects{}},
	{unanswered, no, someWaits, []event{eventGone}, state{phase: queued}, effects{}},

	{taking, any2, anyWaits, []event{eventAnsweredAlone}, state{phase: taking, alone: true}, effects{}},
	{taking, any2, anyWaits, []event{eventRefused}, state{phase: taking, uncertain: true}, effects{}},
	{taking, no, anyWaits, []event{eventSealed}, state{phase: finished}, effects{to: allAnswered, verdict: dedup.Turned}},
	{taking, yes, anyWaits, []event{eventSealed}, state{phase: finished}, effects{log: asUnsent, to: allAnswered, verdict: dedup.Turned}},
	{taking, yes, anyWaits, []event{eventGone}, state{phase: finished}, effects{log: asUnsent, to: thereAnswered, verdict: retried}},
	{taking, no, []audience{noRequest}, []event{eventGone}, state{phase: finished}, effects{}},
	{taking, no, someWaits, []event{eventGone}, state{phase: queued}, effects{}},
	{taking, yes, anyWaits, []event{eventUndone, eventBelieved}, state{phase: finished}, effects{log: asTaken, to: thereAnswered, verdict: retried}},
	{taking, no, []audience{itsAttempt}, []event{eventUndone, eventBelieved}, state{phase: finished}, effects{log: asTaken, known: true, to: thereAnswered, verdict: dedup.Unique}},
	{taking, no, []audience{noRequest, otherAttempts}, []event{eventUndone}, state{phase: unanswered}, effects{}},
	{taking, no, []audience{noRequest, otherAttempts}, []event{eventBelieved}, state{phase: finished}, effects{to: thereAnswered, verdict: dedup.Repeat}},
}

var (
	no, yes, any2 = []bool{false}, []bool{true}, []bool{false, true}
	anyWaits      = []audience{noRequest, otherAttempts, itsAttempt}
	someWaits     = []audience{otherAttempts, itsAttempt}
	notAdded      = []event{eventThere, eventThereAs, eventBefore, eventAfter, eventInDoubt, eventFull, eventKeysFull}
)

// TestEveryStepOfAnEntry tries all pairs of a state and an event. Those that are not in the
// table change nothing.
func TestEveryStepOfAnEntry(t *testing.T) {
	used := make([]bool, len(steps))
	everyState(func(s state) {
		for e := range numEvents {
			want, fx := s, effects{}
			for i, step := range steps {
				if s.phase != step.phase || !slices.Contains(step.alone, s.alone) || !slices.Contains(step.waiting, s.waiting) || !slices.Contains(step.events, e) {
					continue
				}
				if used[i] = true; want != s || fx != (effects{}) {
					t.Errorf("%+v, event %d: two rows", s, e)
				}
				want.phase, fx = step.next.phase, step.fx
				want.alone = s.alone || step.next.alone
				want.uncertain = (s.uncertain || step.next.uncertain) && (want.phase != finished || e == eventBelieved && fx.log == notLogged)
				if fx.verdict == retried {
					if fx.verdict = dedup.Repeat; s.token {
						fx.verdict = dedup.Replayed
					}
				}
			}
			if got, did := s.on(e); got != want || did != fx {
				t.Errorf("%+v, event %d: got %+v, %+v; want %+v, %+v", s, e, got, did, want, fx)
			}
		}
	})
	for i, is := range used {
		if !is {
			t.Errorf("row %d of the table is of no use", i)
		}
	}
}

// everyState calls f with each state that an entry can be in.
func everyState(f func(state)) {
	for phase := range finished + 1 {
		for bits := range 8 {
			s := state{phase: phase, alone: bits&1 != 0, uncertain: bits&2 != 0, token: bits&4 != 0}
			for _, s.waiting = range anyWaits {
				f(s)
			}
		}
	}
}
