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

// The numbers of sync/atomic.
type (
	Uint64 = number[uint64, real.Uint64, *real.Uint64]
	Int64  = number[int64, real.Int64, *real.Int64]
	Uint32 = number[uint32, real.Uint32, *real.Uint32]
	Int32  = number[int32, real.Int32, *real.Int32]
)

// number is a V, the atomic of N.
type number[N, V any, P interface {
	*V
	operations[N]
}] struct{ v V }

type operations[N any] interface {
	Load() N
	Store(N)
	Add(N) N
	Swap(N) N
	CompareAndSwap(a, b N) bool
}

func (x *number[N, V, P]) at() unsafe.Pointer { return unsafe.Pointer(x) }
func (x *number[N, V, P]) Load() N {
	explore.Do(explore.Read, "load", x.at())
	return traced(P(&x.v).Load())
}
func (x *number[N, V, P]) Store(n N) {
	explore.Do(explore.Write, "store", x.at())
	P(&x.v).Store(traced(n))
}
func (x *number[N, V, P]) Add(n N) N {
	explore.Do(explore.Write, "add", x.at())
	return traced(P(&x.v).Add(n))
}
func (x *number[N, V, P]) Swap(n N) N {
	explore.Do(explore.Write, "swap", x.at())
	return traced(P(&x.v).Swap(n))
}
func (x *number[N, V, P]) CompareAndSwap(a, b N) bool {
	explore.Do(explore.Write, "cas", x.at())
	return traced(P(&x.v).CompareAndSwap(a, b))
}

// Tally is Add where the result is not looked at (package overlay).
func (x *number[N, V, P]) Tally(n N) {
	explore.Do(explore.Add, "add", x.at())
	traced(P(&x.v).Add(n))
}

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
