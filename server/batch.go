package server

import (
	"bytes"
	"errors"
	"io"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/gzip"
	"github.com/valyala/fasthttp"

	"verve/counter"
	"verve/dedup"
	"verve/server/callback"
)

const (
	// together is how many ids of a batch are in an epoch at once: what a shared store
	// takes in one trip. In memory that is some 30 us, and their cache misses are
	// waited for together.
	together = 512

	// batchStep is the least memory of a body: most batches fit.
	batchStep = 16 << 10

	// keptBatch bounds the memory of a batch that is kept for the next one.
	keptBatch = 4 << 20
)

// word is the verdict on an item of a batch.
type word uint8

// The words of the contract.
const (
	wordOK word = iota
	wordDuplicate
	wordReplayed
	wordBadID
	wordBadKey
	wordBadToken
	wordFull
	wordUnavailable
	wordDraining
	words
)

var wordTexts = [words]string{"ok", "duplicate", "replayed", "bad-id", "bad-key", "bad-token", "full", "unavailable", "draining"}

// refusal is the reason that a word of refusal is counted under.
func (w word) refusal() (reason, bool) {
	switch w {
	case wordBadID:
		return reasonBadID, true
	case wordBadKey:
		return reasonBadKey, true
	case wordBadToken:
		return reasonBadToken, true
	case wordFull:
		return reasonFull, true
	case wordUnavailable:
		return reasonUnavailable, true
	case wordDraining:
		return reasonDraining, true
	}
	return reason{}, false
}

// batches answers POST requests with a body. The body is read into bounded memory,
// parsed as a whole, and only then are its ids judged, each on its own.
type batches struct {
	server   *Server
	maxBytes int
	maxIDs   int
	memory   int64        // of all bodies that are being read and judged
	used     atomic.Int64 // of it
	free     sync.Pool    // of *batch
	answered atomic.Uint64
}

// batch is the memory of one request.
type batch struct {
	owner  *batches
	held   int64 // of owner.memory
	body   []byte
	plain  []byte // the body, if it came compressed
	gzip   gzip.Reader
	parser parser
	work   work
	out    []byte
}

func newBatches(s *Server) *batches {
	b := &batches{server: s, maxBytes: s.cfg.MaxBatchBytes, maxIDs: s.cfg.MaxBatchIDs, memory: s.cfg.BatchMemory}
	b.free.New = func() any { return &batch{owner: b} }
	return b
}

var (
	errBusy    = errors.New("too much memory is in use by batches")
	errTooLong = errors.New("batch too long")
)

// grow makes room in buf for more bytes, within the memory of all batches.
func (b *batch) grow(buf []byte, size int) ([]byte, error) {
	more := int64(size - cap(buf))
	if more <= 0 {
		return buf, nil
	}
	if b.owner.used.Add(more) > b.owner.memory {
		b.owner.used.Add(-more)
		return buf, errBusy
	}
	b.held += more
	return append(make([]byte, 0, size), buf...), nil
}

// read reads r to its end, in at most limit bytes. It takes memory as bytes come, so
// that a client that announces much and sends little holds little.
func (b *batch) read(buf []byte, r io.Reader, limit int) ([]byte, error) {
	buf = buf[:0]
	for {
		if len(buf) == cap(buf) {
			if len(buf) > limit {
				return buf, errTooLong
			}
			var err error
			if buf, err = b.grow(buf, min(max(2*cap(buf), batchStep), limit+1)); err != nil {
				return buf, err
			}
		}
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		switch {
		case len(buf) > limit:
			return buf, errTooLong
		case err == io.EOF:
			return buf, nil
		case err != nil:
			return buf, err
		}
	}
}

// release gives the memory back. Small memory stays with the batch for the next one, and
// is not counted: there are as many batches as concurrent requests.
func (b *batch) release() {
	b.owner.used.Add(-b.held)
	b.held = 0
	if cap(b.body)+cap(b.plain)+cap(b.parser.scratch)+cap(b.out) > keptBatch {
		b.body, b.plain, b.out, b.parser.scratch = nil, nil, nil, nil
	}
	clear(b.work.items) // they point into the body
	clear(b.parser.items)
	clear(b.work.epochs)
	b.owner.free.Put(b)
}

// load reads and parses the body of a request.
func (b *batch) load(ctx *fasthttp.RequestCtx) (f format, err error) {
	h := &ctx.Request.Header
	if f = formatOf(h.ContentType()); f == formatUnknown {
		return f, errUnsupported
	}
	encoding := h.ContentEncoding()
	compressed := bytes.EqualFold(encoding, []byte("gzip"))
	if len(encoding) > 0 && !compressed && !bytes.EqualFold(encoding, []byte("identity")) {
		return f, errUnsupported
	}
	if h.ContentLength() > b.owner.maxBytes {
		return f, errTooLong
	}
	stream := ctx.RequestBodyStream()
	if stream == nil {
		stream = bytes.NewReader(ctx.Request.Body())
	}
	if b.body, err = b.read(b.body, stream, b.owner.maxBytes); err != nil {
		return f, err
	}
	body := b.body
	if compressed {
		if err = b.gzip.Reset(bytes.NewReader(body)); err != nil {
			return f, errBadBatch
		}
		b.plain, err = b.read(b.plain, &b.gzip, b.owner.maxBytes)
		switch {
		case errors.Is(err, errBusy), errors.Is(err, errTooLong):
			return f, err
		case err != nil:
			return f, errBadBatch
		}
		body = b.plain
	}
	if len(body) == 0 {
		return f, errBadBatch
	}
	b.parser.limit = b.owner.maxIDs
	return f, b.parser.parse(f, body)
}

var errUnsupported = errors.New("unsupported media type or encoding")

// serve answers a request with a body, and starts one callback for it if wanted.
func (bs *batches) serve(ctx *fasthttp.RequestCtx, endpoint callback.Endpoint, wanted bool) {
	s := bs.server
	b := bs.free.Get().(*batch)
	defer b.release()
	f, err := b.load(ctx)
	if err != nil {
		bs.refuse(ctx, err)
		return
	}
	if wanted && !s.callbacks.Reserve(endpoint) {
		s.refuse(ctx, fasthttp.StatusServiceUnavailable, reasonBusy)
		return
	}
	sent := false
	defer func() {
		if wanted && !sent {
			s.callbacks.Release(endpoint)
		}
	}()
	counts := b.counts(b.judge(ctx))
	if wanted && counts[wordOK] > 0 {
		sent = true
		s.callbacks.Send(endpoint)
	}
	bs.answered.Add(1)
	if refused := b.nothingJudged(&counts); refused != nil {
		setRefusal(&ctx.Response, fasthttp.StatusServiceUnavailable, *refused) // counted
		return
	}
	b.answer(ctx, f, &counts)
}

// refuse answers a batch of which nothing was counted.
func (bs *batches) refuse(ctx *fasthttp.RequestCtx, err error) {
	s := bs.server
	// The rest of the body is not read: nothing behind it can be relied on.
	ctx.SetConnectionClose()
	switch {
	case errors.Is(err, errBadBatch):
		s.refuse(ctx, fasthttp.StatusBadRequest, reasonBadRequest)
	case errors.Is(err, errUnsupported):
		s.refuse(ctx, fasthttp.StatusUnsupportedMediaType, reasonBadRequest)
	case errors.Is(err, errTooManyIDs), errors.Is(err, errTooLong):
		s.refuse(ctx, fasthttp.StatusRequestEntityTooLarge, reasonTooLarge)
	case errors.Is(err, errBusy):
		s.refuse(ctx, fasthttp.StatusServiceUnavailable, reasonBusy)
	default:
		s.refuseBroken(ctx, err)
	}
}

// judge asks the set about every item that is well formed, and leaves its word with it.
func (b *batch) judge(ctx *fasthttp.RequestCtx) (cause error) {
	s, w := b.owner.server, &b.work
	w.reset(len(b.parser.items))
	for i := range b.parser.items {
		it := &b.parser.items[i]
		if s.cfg.Uint64IDs && it.word == wordOK && !canonicalUint64(it.id) {
			it.word = wordBadID
		}
		if it.word == wordOK {
			w.items = append(w.items, dedup.Item{ID: it.id})
		}
	}
	now := ctx.Time().UnixNano()
	for from := 0; from < len(w.items); from += together {
		to := min(from+together, len(w.items))
		for i := from; i < to; i++ {
			w.items[i].Key = s.cfg.Set.Key(w.items[i].ID)
		}
		if err := s.judge(now, ctx.ConnID(), w, from, to); cause == nil {
			cause = err
		}
	}
	n := 0
	for i := range b.parser.items {
		if it := &b.parser.items[i]; it.word == wordOK {
			it.word = wordOf(w.verdicts[n])
			n++
		}
	}
	return cause
}

func wordOf(v dedup.Verdict) word {
	switch v {
	case dedup.Unique:
		return wordOK
	case dedup.Repeat:
		return wordDuplicate
	case dedup.Full:
		return wordFull
	case dedup.Turned: // the counter is sealed
		return wordDraining
	default:
		return wordUnavailable
	}
}

// counts counts the words, and those of refusal under their reasons. cause is behind
// those that the set has refused.
func (b *batch) counts(cause error) (n [words]int) {
	for i := range b.parser.items {
		n[b.parser.items[i].word]++
	}
	for w := range words {
		if r, refused := w.refusal(); refused && n[w] > 0 {
			b.owner.server.countRefusals(fasthttp.StatusOK, r, uint64(n[w]), cause)
		}
	}
	return n
}

// nothingJudged returns the reason if every item was refused because none could be
// judged now.
func (b *batch) nothingJudged(n *[words]int) *reason {
	total := len(b.parser.items)
	switch {
	case total == 0:
	case n[wordDraining] == total:
		return &reasonDraining
	case n[wordUnavailable]+n[wordDraining] == total:
		return &reasonUnavailable
	}
	return nil
}

// answer writes the words: a line each, or as JSON.
func (b *batch) answer(ctx *fasthttp.RequestCtx, f format, n *[words]int) {
	r := &ctx.Response
	setHead(r)
	out := b.out[:0]
	if f == formatText {
		for i := range b.parser.items {
			out = append(append(out, wordTexts[b.parser.items[i].word]...), '\n')
		}
	} else {
		r.Header.SetContentTypeBytes(applicationJSON)
		refused := len(b.parser.items) - n[wordOK] - n[wordDuplicate] - n[wordReplayed]
		out = strconv.AppendInt(append(out, `{"ok":`...), int64(n[wordOK]), 10)
		out = strconv.AppendInt(append(out, `,"duplicate":`...), int64(n[wordDuplicate]), 10)
		out = strconv.AppendInt(append(out, `,"replayed":`...), int64(n[wordReplayed]), 10)
		out = strconv.AppendInt(append(out, `,"refused":`...), int64(refused), 10)
		out = append(out, `,"results":[`...)
		for i := range b.parser.items {
			if i > 0 {
				out = append(out, ',')
			}
			out = append(append(append(out, '"'), wordTexts[b.parser.items[i].word]...), '"')
		}
		out = append(out, "]}"...)
	}
	if b.owner.server.cfg.WindowHeader {
		b.setWindows(r)
	}
	b.out = out
	r.SetBody(out) // copied: b is used again before fasthttp writes it
}

var applicationJSON = []byte("application/json")

// setWindows names the windows that ids were judged in: one by itself, more with the
// number of ids in each.
func (b *batch) setWindows(r *fasthttp.Response) {
	var last *counter.Epoch
	var list []byte
	ids := 0
	next := func(e *counter.Epoch) {
		switch {
		case last == nil:
		case e != nil || len(list) > 0:
			list = strconv.AppendInt(append(append(list, last.Label()...), ";n="...), int64(ids), 10)
			if e != nil {
				list = append(list, ", "...)
			}
		default: // the only one
			list = append(list, last.Label()...)
		}
		last, ids = e, 0
	}
	for i, v := range b.work.verdicts[:len(b.work.items)] {
		if v > dedup.Repeat {
			continue
		}
		if e := b.work.epochs[i]; e != last {
			next(e)
		}
		ids++
	}
	next(nil)
	if len(list) > 0 {
		r.Header.SetCanonical(headerWindow, list)
	}
}
