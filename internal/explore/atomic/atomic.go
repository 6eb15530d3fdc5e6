// Package atomic has the API of sync/atomic. While a scenario of package explore
// runs, each operation is a step of its schedule; else it is that of sync/atomic.
package atomic

import (
	real "sync/atomic"
	"unsafe"

	"verve/internal/explore"
)

func traced[T any](v T) T {
	if explore.Tracing() {
		explore.Returned(v)
	}
	return v
}

// Uint64 is an atomic.Uint64.
type Uint64 struct{ v real.Uint64 }

func (x *Uint64) at() unsafe.Pointer { return unsafe.Pointer(x) }
func (x *Uint64) Load() uint64       { explore.Do(explore.Read, "load", x.at()); return traced(x.v.Load()) }
func (x *Uint64) Store(n uint64) {
	explore.Do(explore.Write, "store", x.at())
	x.v.Store(traced(n))
}
func (x *Uint64) Add(n uint64) uint64 {
	explore.Do(explore.Write, "add", x.at())
	return traced(x.v.Add(n))
}
func (x *Uint64) Swap(n uint64) uint64 {
	explore.Do(explore.Write, "swap", x.at())
	return traced(x.v.Swap(n))
}
func (x *Uint64) CompareAndSwap(a, b uint64) bool {
	explore.Do(explore.Write, "cas", x.at())
	return traced(x.v.CompareAndSwap(a, b))
}

// Tally is Add where the result is not looked at (package overlay).
func (x *Uint64) Tally(n uint64) {
	explore.Do(explore.Add, "add", x.at())
	traced(x.v.Add(n))
}

// Int64 is an atomic.Int64.
type Int64 struct{ v real.Int64 }

func (x *Int64) at() unsafe.Pointer { return unsafe.Pointer(x) }
func (x *Int64) Load() int64        { explore.Do(explore.Read, "load", x.at()); return traced(x.v.Load()) }
func (x *Int64) Store(n int64)      { explore.Do(explore.Write, "store", x.at()); x.v.Store(traced(n)) }
func (x *Int64) Add(n int64) int64 {
	explore.Do(explore.Write, "add", x.at())
	return traced(x.v.Add(n))
}
func (x *Int64) Swap(n int64) int64 {
	explore.Do(explore.Write, "swap", x.at())
	return traced(x.v.Swap(n))
}
func (x *Int64) CompareAndSwap(a, b int64) bool {
	explore.Do(explore.Write, "cas", x.at())
	return traced(x.v.CompareAndSwap(a, b))
}

// Tally is Add where the result is not looked at.
func (x *Int64) Tally(n int64) { explore.Do(explore.Add, "add", x.at()); traced(x.v.Add(n)) }

// Int32 is an atomic.Int32.
type Int32 struct{ v real.Int32 }

func (x *Int32) at() unsafe.Pointer { return unsafe.Pointer(x) }
func (x *Int32) Load() int32        { explore.Do(explore.Read, "load", x.at()); return traced(x.v.Load()) }
func (x *Int32) Store(n int32)      { explore.Do(explore.Write, "store", x.at()); x.v.Store(traced(n)) }
func (x *Int32) Add(n int32) int32 {
	explore.Do(explore.Write, "add", x.at())
	return traced(x.v.Add(n))
}
func (x *Int32) Swap(n int32) int32 {
	explore.Do(explore.Write, "swap", x.at())
	return traced(x.v.Swap(n))
}
func (x *Int32) CompareAndSwap(a, b int32) bool {
	explore.Do(explore.Write, "cas", x.at())
	return traced(x.v.CompareAndSwap(a, b))
}

// Tally is Add where the result is not looked at.
func (x *Int32) Tally(n int32) { explore.Do(explore.Add, "add", x.at()); traced(x.v.Add(n)) }

// Uint32 is an atomic.Uint32.
type Uint32 struct{ v real.Uint32 }

func (x *Uint32) at() unsafe.Pointer { return unsafe.Pointer(x) }
func (x *Uint32) Load() uint32       { explore.Do(explore.Read, "load", x.at()); return traced(x.v.Load()) }
func (x *Uint32) Store(n uint32)     { explore.Do(explore.Write, "store", x.at()); x.v.Store(traced(n)) }
func (x *Uint32) Add(n uint32) uint32 {
	explore.Do(explore.Write, "add", x.at())
	return traced(x.v.Add(n))
}
func (x *Uint32) CompareAndSwap(a, b uint32) bool {
	explore.Do(explore.Write, "cas", x.at())
	return traced(x.v.CompareAndSwap(a, b))
}

// Tally is Add where the result is not looked at.
func (x *Uint32) Tally(n uint32) { explore.Do(explore.Add, "add", x.at()); traced(x.v.Add(n)) }

// Bool is an atomic.Bool.
type Bool struct{ v real.Bool }

func (x *Bool) at() unsafe.Pointer { return unsafe.Pointer(x) }
func (x *Bool) Load() bool         { explore.Do(explore.Read, "load", x.at()); return traced(x.v.Load()) }
func (x *Bool) Store(b bool)       { explore.Do(explore.Write, "store", x.at()); x.v.Store(traced(b)) }
func (x *Bool) Swap(b bool) bool {
	explore.Do(explore.Write, "swap", x.at())
	return traced(x.v.Swap(b))
}
func (x *Bool) CompareAndSwap(a, b bool) bool {
	explore.Do(explore.Write, "cas", x.at())
	return traced(x.v.CompareAndSwap(a, b))
}

// Pointer is an atomic.Pointer.
type Pointer[T any] struct{ v real.Pointer[T] }

func (x *Pointer[T]) at() unsafe.Pointer { return unsafe.Pointer(x) }
func (x *Pointer[T]) Load() *T           { explore.Do(explore.Read, "load pointer", x.at()); return x.v.Load() }
func (x *Pointer[T]) Store(p *T)         { explore.Do(explore.Write, "store pointer", x.at()); x.v.Store(p) }
func (x *Pointer[T]) Swap(p *T) *T {
	explore.Do(explore.Write, "swap pointer", x.at())
	return x.v.Swap(p)
}
func (x *Pointer[T]) CompareAndSwap(a, b *T) bool {
	explore.Do(explore.Write, "cas pointer", x.at())
	return traced(x.v.CompareAndSwap(a, b))
}

func LoadUint64(p *uint64) uint64 {
	explore.Do(explore.Read, "load", unsafe.Pointer(p))
	return traced(real.LoadUint64(p))
}

func StoreUint64(p *uint64, n uint64) {
	explore.Do(explore.Write, "store", unsafe.Pointer(p))
	real.StoreUint64(p, traced(n))
}
