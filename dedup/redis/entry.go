package redis

import "verve/dedup"

// phase is how far an entry has come.
type phase uint8

const (
	queued     phase = iota // to be sent
	flying                  // in the batch under way
	unanswered              // in Redis, but all its requests got 503; to be taken back
	taking                  // is being taken back
	finished                // out of the lane
)

// audience is which requests wait for an entry. An attempt is a request with its retries: see
// sameAttempt.
type audience uint8

const (
	noRequest     audience = iota
	otherAttempts          // only requests of other attempts than the one that it is sent for
	itsAttempt             // one of this attempt, and maybe others
)

// state is all that the next step of an entry depends on.
type state struct {
	phase     phase
	alone     bool // a request was answered as new without Redis
	uncertain bool // a request got 503, or is about to, while the id may be in Redis: see Ledger.addUncertain

	// Only entry.now sets these, for one step.
	waiting audience
	token   bool // the attempt has a token
}

// event is what happens to an entry.
type event uint8

const (
	// What a batch that adds or looks has found.
	eventInDoubt  event = iota // another instance may have added it without an answer; or it was not judged
	eventAdded                 // it is new
	eventThere                 // it was there
	eventThereAs               // it was there with the token of the attempt
	eventBefore                // the token is in the window before
	eventAfter                 // the token is in the next window, which another instance has opened
	eventFull                  // there is no room for it
	eventKeysFull              // there is no room for its key

	eventSent           // in a batch that adds it, or takes it back
	eventUndone         // that batch was certainly not done
	eventBelieved       // it was not taken back: other instances may have answered requests for it
	eventGone           // Redis does not have it any more: it was taken back, or lost
	eventSealed         // no batch of its epoch is done any more
	eventAskedAgain     // its attempt is made again, by a request that does not wait
	eventAnsweredAlone  // a request was answered as new without Redis
	eventAnsweredBeside // a request that waited was answered without the entry
	eventRefused        // a request got 503, or soon will

	numEvents
)

// eventOf is the event for each code that lane.lua answers in a batch that adds.
var eventOf = [256]event{
	'1': eventAdded, '0': eventThere, '6': eventThereAs, '7': eventBefore, '8': eventAfter, '4': eventFull, '9': eventKeysFull,
}

// outcomes are the answers to the requests for an id that a batch was to add and did not add.
var outcomes = [numEvents]effects{
	eventThere:    {to: thereAnswered, verdict: dedup.Repeat, known: true},
	eventThereAs:  {to: thereAnswered, verdict: dedup.Replayed, known: true},
	eventBefore:   {to: attemptAnswered, verdict: dedup.ReplayedBefore},
	eventAfter:    {to: attemptAnswered, verdict: dedup.ReplayedAfter},
	eventFull:     {to: thereAnswered, verdict: dedup.Repeat, err: dedup.ErrFull}, // another attempt may be a retry from the window before
	eventKeysFull: {to: thereAnswered, verdict: dedup.Repeat, err: dedup.ErrTooManyKeys},
}

// logging is how an id that was answered as new goes into the log.
type logging uint8

const (
	notLogged logging = iota
	asTaken           // Redis has it
	asUnsent          // Redis is to get it
)

// recipients are the requests that get an answer.
type recipients uint8

const (
	noneAnswered    recipients = iota
	attemptAnswered            // those that make its attempt; others are sent on their own
	thereAnswered              // the same, and those without a token: the id is in the epoch, or has no room there
	allAnswered
)

// effects is what the lane does when an entry has taken a step, besides putting it into the
// list of its new phase.
type effects struct {
	log     logging
	known   bool // a repeat of the id costs no trip from now on
	to      recipients
	verdict dedup.Verdict // if that is Unique, only the first of the attempt gets it: the others get state.retried
	err     error         // of the requests that get an answer
}

// on is the only code that changes the state of an entry. An event that cannot happen in
// a state changes nothing.
func (s state) on(e event) (state, effects) {
	was, fx := s.phase, effects{}
	switch {
	case s.phase == finished:
	case s.phase == queued:
		s, fx = s.onQueued(e)

	// From here on the id may be in Redis.
	case e == eventSealed: // too late to take it back
		s, fx = s.turned()
	case e == eventAnsweredAlone:
		s.alone = true
	case e == eventRefused:
		s.uncertain = true
	case s.phase == flying:
		s, fx = s.onFlying(e)
	case s.phase == unanswered:
		s, fx = s.onUnanswered(e)
	case s.phase == taking:
		s, fx = s.onTaking(e)
	}
	if s.phase == finished && was != finished && !(e == eventBelieved && fx.log == notLogged) {
		s.uncertain = false // otherwise the id stays in Redis, though no request got ok for it
	}
	return s, fx
}

func (s state) onQueued(e event) (state, effects) {
	switch e {
	case eventSent:
		s.phase = flying
	case eventAnsweredAlone:
		s.phase = finished
		return s, effects{log: asUnsent}
	case eventAnsweredBeside:
		if s.waiting == noRequest {
			s.phase = finished
		}
	}
	return s, effects{}
}

func (s state) onFlying(e event) (state, effects) {
	fx := outcomes[e]
	answered := fx.to != noneAnswered
	switch {
	case e == eventAdded:
		return s.inRedis()
	case e == eventUndone || e == eventInDoubt || answered && s.alone:
		// If another instance has added the id and this one has answered alone, the batch that
		// adds it from the log finds it there, and marks the epoch inexact.
		return s.notInRedis()
	case answered:
		s.phase = finished
		fx.known = fx.known && s.waiting != noRequest
	}
	return s, fx
}

func (s state) onUnanswered(e event) (state, effects) {
	switch e {
	case eventSent:
		s.phase = taking
	case eventGone:
		return s.notInRedis()
	case eventAskedAgain: // that request gets Unique
		s.phase = finished
		return s, effects{log: asTaken, known: true, to: thereAnswered, verdict: s.retried()}
	}
	return s, effects{}
}

func (s state) onTaking(e event) (state, effects) {
	switch e {
	case eventUndone:
		return s.inRedis()
	case eventGone: // a request may have sent it again meanwhile
		return s.notInRedis()
	case eventBelieved: // it is in Redis for good: if a request of its attempt waits, that one gets it as new
		if s.alone || s.waiting == itsAttempt {
			return s.inRedis()
		}
		s.phase = finished
		return s, effects{to: thereAnswered, verdict: dedup.Repeat}
	}
	return s, effects{}
}

// inRedis finishes an id that is in Redis, if a request has, or gets, ok for it. Otherwise
// the id is to be taken back.
func (s state) inRedis() (state, effects) {
	switch {
	case s.alone:
		s.phase = finished
		return s, effects{log: asTaken, to: thereAnswered, verdict: s.retried()}
	case s.waiting != itsAttempt:
		s.phase = unanswered
		return s, effects{}
	}
	s.phase = finished
	return s, effects{log: asTaken, known: true, to: thereAnswered, verdict: dedup.Unique}
}

// notInRedis queues an id that this session has not added, if a request waits for it. If one
// was answered as new, it is logged, to be added.
func (s state) notInRedis() (state, effects) {
	switch {
	case s.alone:
		s.phase = finished
		return s, effects{log: asUnsent, to: thereAnswered, verdict: s.retried()}
	case s.waiting == noRequest:
		s.phase = finished
		return s, effects{}
	}
	s.phase = queued
	return s, effects{}
}

// turned finishes an id of an epoch that is sealed. If a request was answered as new, Retire
// reports that the id is in no count.
func (s state) turned() (state, effects) {
	fx := effects{to: allAnswered, verdict: dedup.Turned}
	if s.alone {
		fx.log = asUnsent
	}
	s.phase = finished
	return s, fx
}

// retried is the verdict on a later request of an attempt that was answered as new.
func (s state) retried() dedup.Verdict {
	if s.token {
		return dedup.Replayed
	}
	return dedup.Repeat
}
