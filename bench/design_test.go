package bench

// Design is a set of ids of the open epoch, written as its own author would write it. All
// designs pass the same suite of tests, and the benchmarks stop at a wrong answer, so that
// speed is never bought with exactness.
type Design interface {
	// Add reports whether id is new in the open epoch, and counts it there if so.
	// It keeps no reference to id. writer numbers the calling goroutine from 0.
	// Safe for concurrent use.
	Add(id []byte, writer int) bool

	// Turn ends the open epoch and opens the next. Only Verve promises exact
	// counts for a Turn during an Add; the others are spared what that costs.
	Turn()

	// Settle returns when what turned epochs left is reclaimed, as far as the
	// design does so itself, and returns the sum of the ids they counted. It is
	// not called beside Add or Turn.
	Settle() uint64

	// Close ends the design's goroutines. No Add may follow.
	Close()
}

// Batcher is a Design that takes ids which arrive together, too.
type Batcher interface {
	Design

	// AddMany adds ids in their order and returns how many were new.
	AddMany(ids [][]byte, writer int) (fresh int)
}

// together is how many ids a Batcher gets at once: as many requests as clients that
// pipeline have in flight.
const together = 16

// Sizes are the unique ids that a design is made to expect in an epoch.
type Sizes struct {
	Numbers int // canonical decimals
	Others  int
}

// Maker makes a design by name.
type Maker struct {
	Name string
	New  func(Sizes) Design

	// Keeps is set where memory of one epoch serves the next: such a design
	// gets a window to warm up.
	Keeps bool

	// AddsOnly is set where all but the adds is as another design's.
	AddsOnly bool

	// MaxIDs is how many ids in an epoch a machine of 24 GB has memory for. 0: as
	// many as are measured.
	MaxIDs int
}

// Makers lists the designs in the order they are measured.
var Makers = []Maker{
	{Name: "verve", New: func(s Sizes) Design { return NewVerve(s) }, Keeps: true},
	{Name: "verve16", New: func(s Sizes) Design { return Together{NewVerve(s)} }, Keeps: true, AddsOnly: true},
	{Name: "seed", New: func(Sizes) Design { return NewSeed() }, MaxIDs: 10_000_000},
	{Name: "gomaps", New: func(s Sizes) Design { return NewMaps(s) }, Keeps: true},
	{Name: "xsync", New: func(s Sizes) Design { return NewXsync(s) }, Keeps: true},
	{Name: "swiss", New: func(s Sizes) Design { return NewSwiss(s) }, Keeps: true},
}
