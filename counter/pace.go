package counter

import "time"

const (
	// paceWork is how long work in the background may keep a processor, and paceRest how long
	// it leaves it then. Without a rest a request waits for some milliseconds until the kernel
	// takes the processor away from that work: few do, but p99.9 shows them. On one processor
	// p99 after a turn is 1.1 to 1.2 times that before it, and with 100 and 300 us it was 1.4 to
	// 1.7. With a fifth of a processor 100,000 keys are at a broker after 1.2 to 1.7 s.
	paceWork = 30 * time.Microsecond
	paceRest = 120 * time.Microsecond

	// paceSteps is how many steps, of some tens of nanoseconds each, pass between two looks at
	// the time.
	paceSteps = 128
)

// paceBegan is when the first part for work began.
var paceBegan = time.Now()

// Pace lets work in the background, such as the publishing of 100,000 keys at the turn, give
// way to requests. The zero value is ready; nil never sleeps. One goroutine at a time uses it.
//
// All rest at the same time, by the clock. Two that rested each for itself worked in turns: the
// scheduler of Go always had one of them to run, and while it has it does not look whether
// requests have arrived, for up to 10 ms.
type Pace struct{ steps int }

// Step is called between small pieces of the work, of a microsecond at most. Once in a while
// it sleeps.
func (p *Pace) Step() {
	if p == nil {
		return
	}
	if p.steps++; p.steps%paceSteps == 0 {
		Rest()
	}
}

// Rest is Pace.Step between larger pieces, such as the steps of publishing a record, of which
// each takes a processor for some 50 us: it looks at the time at each call. It is safe for
// concurrent use.
func Rest() {
	if at := time.Since(paceBegan) % (paceWork + paceRest); at >= paceWork {
		time.Sleep(paceWork + paceRest - at)
	}
}
