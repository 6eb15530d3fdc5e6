// Package atomic has the API of sync/atomic. While a scenario of package explore runs, each
// operation is a step of its schedule; otherwise it is the operation of sync/atomic.
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

// The types of sync/atomic.
type (
	Uint64 = number[uint64, real.Uint64, *real.Uint64]
	Int64  = number[int64, real.Int64, *real.Int64]
	Uint32 = number[uint32, real.Uint32, *real.Uint32]
	Int32  = number[int32, real.Int32, *real.Int32]
	Bool   = value[bool, real.Bool, *real.Bool]

	Pointer[T any] = value[*T, real.Pointer[T], *real.Pointer[T]]
)

// value wraps V, the type of sync/atomic that holds a T.
type value[T, V any, P interface {
	*V
	cell[T]
}] struct{ v V }

type cell[T any] interface {
	Load() T
	Store(T)
	Swap(T) T
	CompareAndSwap(a, b T) bool
}

func (x *value[T, V, P]) at() unsafe.Pointer { return unsafe.Pointer(x) }
func (x *value[T, V, P]) Load() T {
	explore.Do(explore.Read, "load", x.at())
	return traced(P(&x.v).Load())
}
func (x *value[T, V, P]) Store(n T) {
	explore.Do(explore.Write, "store", x.at())
	P(&x.v).Store(traced(n))
}
func (x *value[T, V, P]) Swap(n T) T {
	explore.Do(explore.Write, "swap", x.at())
	return traced(P(&x.v).Swap(n))
}
func (x *value[T, V, P]) CompareAndSwap(a, b T) bool {
	explore.Do(explore.Write, "cas", x.at())
	return traced(P(&x.v).CompareAndSwap(a, b))
}

// number is a value that has Add.
type number[T, V any, P interface {
	*V
	cell[T]
	Add(T) T
}] struct{ value[T, V, P] }

func (x *number[T, V, P]) Add(n T) T {
	explore.Do(explore.Write, "add", x.at())
	return traced(P(&x.v).Add(n))
}

// Tally is an Add whose result is not used (package overlay): such Adds commute.
func (x *number[T, V, P]) Tally(n T) {
	explore.Do(explore.Add, "add", x.at())
	traced(P(&x.v).Add(n))
}

func LoadUint64(p *uint64) uint64 {
	explore.Do(explore.Read, "load", unsafe.Pointer(p))
	return traced(real.LoadUint64(p))
}

func StoreUint64(p *uint64, n uint64) {
	explore.Do(explore.Write, "store", unsafe.Pointer(p))
	real.StoreUint64(p, traced(n))
}
