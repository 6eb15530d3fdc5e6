package explore

import "unsafe"

// The functions of this file replace what a thread does with a channel (package overlay,
// Config.Channels). The channel itself is an ordinary one of Go. All channels count as one
// location. A channel without a buffer may only be closed. If several cases of a select are
// ready, it takes the first.

var channels byte

// Channels is the location of all channels.
func Channels() unsafe.Pointer { return unsafe.Pointer(&channels) }

func receivable[T any](ch <-chan T) bool {
	if len(ch) > 0 {
		return true
	}
	select {
	case <-ch: // it is closed: no thread waits to send
		return ch != nil
	default:
		return false
	}
}

// Receive replaces <-ch.
func Receive[T any](ch <-chan T) T {
	Until(func() bool { return receivable(ch) }, "receive", unsafe.Pointer(&channels))
	return <-ch
}

// Send replaces ch <- v.
func Send[T any](ch chan<- T, v T) {
	Until(func() bool { return len(ch) < cap(ch) }, "send", unsafe.Pointer(&channels))
	ch <- v
}

// Close replaces close(ch).
func Close[T any](ch chan<- T) {
	Do(Write, "close", unsafe.Pointer(&channels))
	close(ch)
}

// Case is one case of a select.
type Case struct {
	ready func() bool
	do    func()
}

// Receiving returns the Case <-ch.
func Receiving[T any](ch <-chan T) Case {
	return Case{func() bool { return receivable(ch) }, func() { <-ch }}
}

// Sending returns the Case ch <- v.
func Sending[T any](ch chan<- T, v T) Case {
	return Case{func() bool { return len(ch) < cap(ch) }, func() { ch <- v }}
}

// Select does one of the cases and returns its number. If none is ready it waits, or, with
// otherwise (the select has a default), returns -1.
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
