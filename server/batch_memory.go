package server

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"unsafe"

	"verve/counter"
	"verve/dedup"
)

const (
	// batchStep is the size of the smallest buffer: most batches fit in a few of these.
	batchStep = 16 << 10

	// bufferClasses is how many sizes of buffers there are. Each is twice the one before.
	// The largest is larger than maxMaxBatchBytes.
	bufferClasses = 14

	// keptItems bounds, in items, the tables that are kept for the next batch.
	keptItems = DefaultMaxBatchIDs
)

// batchMemory bounds the memory that all batches use together, in bytes. Memory in use is
// counted. Memory in the pools is not: it was in use before, and the garbage collector frees it.
type batchMemory struct {
	limit   int64
	used    atomic.Int64
	buffers [bufferClasses]sync.Pool // of *buffer, by size
	tables  sync.Pool                // of *tables
}

type buffer struct{ b []byte }

// bodies is the part of the memory that bodies may take, because they may arrive slowly. The
// rest is for batches that have arrived, which need it only for a moment.
func (m *batchMemory) bodies() int64 { return m.limit - m.limit/4 }

// tables have what is known about each item of a batch.
type tables struct {
	work    work            // of the ids that are well formed
	words   []word          // of every item
	options []dedup.Options // of the items with options of their own
}

const (
	itemBytes    = int(unsafe.Sizeof(dedup.Item{}) + unsafe.Sizeof(dedup.Verdict(0)) + unsafe.Sizeof((*counter.Epoch)(nil)) + unsafe.Sizeof(word(0)))
	optionsBytes = int(unsafe.Sizeof(dedup.Options{}))
)

func (t *tables) bytes() int64 {
	return int64(cap(t.words)*itemBytes + cap(t.options)*optionsBytes)
}

// batchNeeds returns the memory that the largest batch takes, in bytes: for its body while it
// grows, for the decompressed body if it was compressed, and for its tables.
func batchNeeds(maxBytes, maxIDs int) int64 {
	return 4*int64(maxBytes) + int64(maxIDs*(itemBytes+optionsBytes))
}

// charge counts n more bytes for b, unless that is over the limit.
func (b *batch) charge(n, limit int64) error {
	if n > 0 && b.owner.used.Add(n) > limit {
		b.owner.used.Add(-n)
		return errBusy
	}
	b.held += n
	return nil
}

// grow returns a buffer of at least size bytes with the content of buf: buf itself if it is
// large enough, else a larger one, and drops buf.
func (b *batch) grow(buf *buffer, size int, limit int64) (*buffer, error) {
	if buf != nil && cap(buf.b) >= size {
		return buf, nil
	}
	class := bits.Len(uint(max(size-1, 0) / batchStep))
	size = batchStep << class
	if err := b.charge(int64(size), limit); err != nil {
		return buf, err
	}
	larger, _ := b.owner.buffers[class].Get().(*buffer)
	if larger == nil {
		larger = &buffer{make([]byte, 0, size)}
	}
	larger.b = larger.b[:0]
	if buf != nil {
		larger.b = append(larger.b, buf.b...)
		b.drop(buf)
	}
	return larger, nil
}

// drop gives a buffer back to its pool; nil: it does nothing.
func (b *batch) drop(buf *buffer) {
	if buf == nil {
		return
	}
	n := int64(cap(buf.b))
	b.owner.used.Add(-n)
	b.held -= n
	b.owner.buffers[bits.Len(uint(cap(buf.b)-1)/batchStep)].Put(buf)
}

// room returns an empty slice for n elements: s if it has room. size is how many bytes an
// element takes, with what belongs to it.
func room[T any](b *batch, s []T, n, size int) ([]T, error) {
	if n <= cap(s) {
		return s[:0], nil
	}
	if err := b.charge(int64((n-cap(s))*size), b.owner.limit); err != nil {
		return s, err
	}
	return make([]T, 0, n), nil
}

// makeTables gives b tables for the words and the verdicts of n items.
func (b *batch) makeTables(n int) (err error) {
	t, _ := b.owner.tables.Get().(*tables)
	if t == nil || b.charge(t.bytes(), b.owner.limit) != nil {
		t = new(tables)
	}
	b.tables = t
	if t.words, err = room(b, t.words, n, itemBytes); err == nil {
		t.work.reset(cap(t.words))
	}
	return err
}

// forget clears the keys and tokens in t: they belong to one request.
func (t *tables) forget() {
	if t.work.shared.Under == nil && t.work.shared.Token == nil && len(t.options) == 0 {
		return
	}
	clear(t.work.items)
	clear(t.options)
	t.options, t.work.shared = t.options[:0], dedup.Options{}
}

// finish gives back what b no longer needs when its answer is rendered. Its tables still point
// into buffers, but those are in the pools as well.
func (b *batch) finish() {
	for _, buf := range []*buffer{b.body, b.unpacked, b.scratch} {
		b.drop(buf)
	}
	b.body, b.unpacked, b.scratch, b.common = nil, nil, nil, nil
	if t := b.tables; t != nil {
		b.tables = nil
		t.forget()
		if cap(t.words) <= keptItems {
			b.owner.tables.Put(t)
		}
	}
	answer := int64(0)
	if b.out != nil {
		answer = int64(cap(b.out.b))
	}
	b.owner.used.Add(answer - b.held)
	b.held = answer
}

// release gives back all that b has.
func (b *batch) release() {
	b.drop(b.out)
	b.out = nil
	b.finish()
}
