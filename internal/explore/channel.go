package explore

import "unsafe"

// The functions of this file stand for what a thread does with a channel (package overlay,
// Config.Channels). The channel is one of Go. All channels are one location. A channel
// without a buffer serves to be closed, and for nothing else. Of several cases that are
// ready a select takes the first.

var channels byte

// Channels is the location of all channels.
func Channels() unsafe.Pointer { return unsafe.Pointer(&channels) }

func receivable[T any](ch <-chan T) bool {
	if len(ch) > 0 {
		return true
	}
	select {
	case <-ch: // it is closed: nobody waits to send
		return ch != nil
	default:
		return false
	}
}

// Receive is <-ch.
func Receive[T any](ch <-chan T) T {
	Until(func() bool { return receivable(ch) }, "receive", unsafe.Pointer(&channels))
	return <-ch
}

// Send is ch <- v.
func Send[T any](ch chan<- T, v T) {
	Until(func() bool { return len(ch) < cap(ch) }, "send", unsafe.Pointer(&channels))
	ch <- v
}

// Close is close(ch).
func Close[T any](ch chan<- T) {
	Do(Write, "close", unsafe.Pointer(&channels))
	close(ch)
}

// Case is one of a select.
type Case struct {
	ready func() bool
	do    func()
}

// Receiving is case <-ch.
func Receiving[T any](ch <-chan T) Case {
	return Case{func() bool { return receivable(ch) }, func() { <-ch }}
}

// Sending is case ch <- v.
func Sending[T any](ch chan<- T, v T) Case {
	return Case{func() bool { return len(ch) < cap(ch) }, func() { ch <- v }}
}

// Select does one of the cases and returns its number; -1 if none is ready and there is an
// otherwise.
func Select(otherwise bool, cases ...Case) int {
	first := func() int {
		for i, c := range cases {
			if c.ready() {
				return i
			}
		}
		return -1
	}
	if Until(func() bool { return otherwise || first() >= 0 }, "select", unsafe.Pointer(&channels)); first() >= 0 {
		i := first()
		cases[i].do()
		return i
	}
	if !otherwise {
		panic("explore: a select that waits, outside of a scenario")
	}
	return -1
}
