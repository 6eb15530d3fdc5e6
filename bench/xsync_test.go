package bench

import (
	"sync/atomic"

	"github.com/puzpuzpuz/xsync/v4"
)

// Xsync is a concurrent map of puzpuzpuz/xsync for each epoch, with its striped
// counter. The map of the next epoch is made as large as the last one was.
type Xsync struct {
	open  atomic.Pointer[xsyncEpoch]
	total uint64
}

type xsyncEpoch struct {
	numbers *xsync.Map[uint64, struct{}]
	others  *xsync.Map[wide, struct{}]
	unique  *xsync.Counter
}

func newXsyncEpoch(expect Sizes) *xsyncEpoch {
	return &xsyncEpoch{
		numbers: xsync.NewMap[uint64, struct{}](xsync.WithPresize(expect.Numbers)),
		others:  xsync.NewMap[wide, struct{}](xsync.WithPresize(expect.Others)),
		unique:  xsync.NewCounter(),
	}
}

// NewXsync makes maps of the size expected.
func NewXsync(expect Sizes) *Xsync {
	x := new(Xsync)
	x.open.Store(newXsyncEpoch(expect))
	return x
}

// Add implements Design.
func (x *Xsync) Add(id []byte, _ int) bool {
	e := x.open.Load()
	var seen bool
	if n, w, isNumber := parse(id); isNumber {
		_, seen = e.numbers.LoadOrStore(n, struct{}{})
	} else {
		_, seen = e.others.LoadOrStore(w, struct{}{})
	}
	if !seen {
		e.unique.Inc()
	}
	return !seen
}

// Turn swaps the maps; the old ones are garbage.
func (x *Xsync) Turn() {
	old := x.open.Load()
	x.open.Store(newXsyncEpoch(Sizes{old.numbers.Size(), old.others.Size()}))
	x.total += uint64(old.unique.Value())
}

// Settle implements Design.
func (x *Xsync) Settle() uint64 { return x.total }

// Close implements Design.
func (x *Xsync) Close() {}
