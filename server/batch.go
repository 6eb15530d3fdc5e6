package server

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/valyala/fasthttp"

	"verve/dedup"
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

var (
	wordLines = [words]string{"ok\n", "duplicate\n", "replayed\n", "bad-id\n", "bad-key\n", "bad-token\n", "full\n", "unavailable\n", "draining\n"}
	wordItems = [words]string{`"ok",`, `"duplicate",`, `"replayed",`, `"bad-id",`, `"bad-key",`, `"bad-token",`, `"full",`, `"unavailable",`, `"draining",`}
)

// wordReasons are the reasons under which the words from wordBadID on are counted.
var wordReasons = [words]reason{
	wordBadID: reasonBadID, wordBadKey: reasonBadKey, wordBadToken: reasonBadToken,
	wordFull: reasonFull, wordUnavailable: reasonUnavailable, wordDraining: reasonDraining,
}

// batches answers POST requests with a body. It reads the body into bounded memory, and parses
// all of it. Only then it judges the ids, each on its own.
type batches struct {
	batchMemory
	server   *Server
	maxBytes int
	maxIDs   int
	free     sync.Pool // of *batch
	unpack   sync.Pool // of *gzip.Reader
	decoders sync.Pool // of *jsontext.Decoder
	answered atomic.Uint64
}

// batch is a request with a body, from its arrival until its answer is written.
type batch struct {
	owner *batches
	held  int64 // its part of owner.used

	body, unpacked, out *buffer // unpacked is the body, if it came compressed
	*tables
	parser
	packed bytes.Reader
	one    [1]byte
}

// batchValue is the name of the value of a request that is its batch. fasthttp closes the
// values of a request when its answer is written.
const batchValue = "batch"

// Close implements io.Closer.
func (b *batch) Close() error {
	b.release()
	b.owner.free.Put(b)
	return nil
}

func newBatches(s *Server) *batches {
	b := &batches{server: s, maxBytes: s.cfg.MaxBatchBytes, maxIDs: s.cfg.MaxBatchIDs}
	b.limit = s.cfg.limits.BatchMemory
	b.free.New = func() any { return &batch{owner: b} }
	return b
}

// read reads r to its end, or returns errTooLarge if that is more than limit bytes. It takes
// memory as bytes arrive, so that a client that announces much and sends little holds little
// memory. The caller drops the buffer, also after an error.
func (b *batch) read(r io.Reader, limit int, memory int64) (buf *buffer, err error) {
	for have := 0; err == nil; have = len(buf.b) {
		into := b.one[:] // at the limit: to see whether there is one more byte
		if have < limit {
			if buf, err = b.grow(buf, have+1, memory); err != nil {
				return buf, err
			}
			into = buf.b[have:min(cap(buf.b), limit)]
		}
		var n int
		if n, err = r.Read(into); n > 0 && have == limit {
			return buf, errTooLarge
		}
		buf.b = buf.b[:have+n]
	}
	if err == io.EOF {
		err = nil
	}
	return buf, err
}

// packedSlack is how many bytes longer than its content a gzip body may be: what gzip adds to n
// bytes that it cannot compress, and its header.
func packedSlack(n int) int { return n>>10 + 4<<10 }

// head checks the headers of a batch, and returns its format and whether it is compressed.
func (bs *batches) head(h *fasthttp.RequestHeader) (f format, compressed bool, err error) {
	if f = formatOf(h.ContentType()); f == formatUnknown {
		return f, false, errUnsupported
	}
	compressed, ok := isGzip(h.PeekAll(fasthttp.HeaderContentEncoding))
	if !ok {
		return f, false, errUnsupported
	}
	limit := bs.maxBytes
	if compressed {
		limit += packedSlack(limit)
	}
	if h.ContentLength() > limit {
		return f, compressed, errTooLarge
	}
	return f, compressed, nil
}

// isGzip reports whether a body with these lines of Content-Encoding is compressed with gzip. It
// is not ok if they name another encoding than gzip and identity, or more than one. A list may
// have empty elements (RFC 9110, section 5.6.1.2).
func isGzip(lines [][]byte) (yes, ok bool) {
	named := 0
	for _, line := range lines {
		for name := range bytes.SplitSeq(line, []byte(",")) {
			switch name = bytes.Trim(name, " \t"); {
			case len(name) == 0:
				continue
			case bytes.EqualFold(name, []byte("gzip")), bytes.EqualFold(name, []byte("x-gzip")):
				yes = true
			case !bytes.EqualFold(name, []byte("identity")):
				return false, false
			}
			named++
		}
	}
	return yes, named <= 1
}

// load reads and parses the body of a request. options are those of the query, for all items.
func (b *batch) load(ctx *fasthttp.RequestCtx, options *dedup.Options) (f format, err error) {
	f, compressed, err := b.owner.head(&ctx.Request.Header)
	if err != nil {
		return f, err
	}
	stream := bodyOf(ctx)
	if stream == nil {
		return f, errBadRequest
	}
	limit := b.owner.maxBytes
	if compressed {
		limit += packedSlack(limit)
	}
	if b.body, err = b.read(stream, limit, b.owner.bodies()); err != nil {
		return f, err
	}
	body := b.body
	if compressed {
		if err = b.decompress(); err != nil {
			return f, err
		}
		body = b.unpacked
	}
	if len(body.b) == 0 {
		return f, errBadRequest
	}
	return f, b.parse(f, body.b, options)
}

// decompress sets unpacked to the decompressed body.
func (b *batch) decompress() (err error) {
	b.packed.Reset(b.body.b)
	defer b.packed.Reset(nil)
	z, _ := b.owner.unpack.Get().(*gzip.Reader)
	if z == nil {
		z = new(gzip.Reader)
	}
	defer b.owner.unpack.Put(z)
	if z.Reset(&b.packed) != nil {
		return errBadRequest
	}
	b.unpacked, err = b.read(z, b.owner.maxBytes, b.owner.limit)
	if err == nil || err == errBusy || err == errTooLarge {
		return err
	}
	return errBadRequest
}

// serve answers a request with a body, and sends one callback if that is wanted and an id is
// new. Or it returns why the request is refused.
func (bs *batches) serve(ctx *fasthttp.RequestCtx, a *asked) error {
	s := bs.server
	b := bs.free.Get().(*batch)
	ctx.SetUserValue(batchValue, b)
	defer b.finish() // Close releases the rest, when the answer is written
	f, err := b.load(ctx, &a.options)
	if err != nil {
		return broken(ctx, err)
	}
	if a.wanted && !s.cfg.Callbacks.Reserve(a.endpoint) {
		s.countRefusals(errNoPlace, uint64(max(1, len(b.words))), nil)
		setRefusal(&ctx.Response, errNoPlace)
		return nil
	}
	sent := false
	defer func() {
		if a.wanted && !sent {
			s.cfg.Callbacks.Release(a.endpoint)
		}
	}()
	// Not ctx.Time: the body may have arrived much later.
	cause := s.judge(time.Now().UnixNano(), ctx.ConnID(), &b.work)
	counts := b.assignWords(cause)
	s.replayed.Add(uint64(counts[wordReplayed]))
	if a.wanted && counts[wordOK] > 0 {
		sent = true
		s.cfg.Callbacks.Send(a.endpoint)
	}
	bs.answered.Add(1)
	if why, refused := b.nothingJudged(&counts); refused {
		if why.last {
			ctx.SetConnectionClose()
		}
		setRefusal(&ctx.Response, why) // assignWords has counted it
		return nil
	}
	b.answer(&ctx.Response, f, &counts)
	return nil
}

// wordOf returns the word for a verdict. cause is why an id got no verdict of the set.
func wordOf(v dedup.Verdict, cause error) word {
	switch {
	case v == dedup.Unique:
		return wordOK
	case v == dedup.Repeat:
		return wordDuplicate
	case v.IsReplay():
		return wordReplayed
	case v == dedup.Full:
		return wordFull
	case v == dedup.Turned && !errors.Is(cause, errPanicked): // the counter is sealed
		return wordDraining
	default:
		return wordUnavailable
	}
}

// assignWords sets the words of the items that were judged, and counts all words. It also counts
// refusals under their reasons. cause is why the set has refused items.
func (b *batch) assignWords(cause error) (n [words]int) {
	of := [dedup.Verdicts]word{}
	for v := range of {
		of[v] = wordOf(dedup.Verdict(v), cause)
	}
	judged := 0
	for i, w := range b.words {
		if w == wordOK {
			w = of[b.work.verdicts[judged]]
			b.words[i] = w
			judged++
		}
		n[w]++
	}
	for w := wordBadID; w < words; w++ {
		if n[w] > 0 {
			b.owner.server.countRefusals(refusal{status: fasthttp.StatusOK, reason: wordReasons[w]}, uint64(n[w]), cause)
		}
	}
	return n
}

// nothingJudged reports whether none of the well-formed items could be judged now, and why. Then
// the status is that of a refusal, because a client that looks at the status alone has to send
// these items again.
func (b *batch) nothingJudged(n *[words]int) (why refusal, refused bool) {
	good := len(b.words) - n[wordBadID] - n[wordBadKey] - n[wordBadToken]
	if good > 0 && n[wordDraining] == good {
		return errDraining, true
	}
	return errUnavailable, good > 0 && n[wordUnavailable]+n[wordDraining] == good
}

// answer writes the words: one per line, or as JSON. If the memory of batches is used up, it
// writes them nevertheless, because the ids are counted.
func (b *batch) answer(r *fasthttp.Response, f format, n *[words]int) {
	setHead(r)
	texts := &wordLines
	if f != formatText {
		texts = &wordItems
	}
	size := len(`{"ok":,"duplicate":,"replayed":,"refused":,"results":[]}`) + 4*20
	for w := range n {
		size += n[w] * len(texts[w])
	}
	var out []byte
	if buf, err := b.grow(nil, size, b.owner.limit); err == nil {
		b.out, out = buf, buf.b
	} else {
		out = make([]byte, 0, size)
	}
	if f != formatText {
		r.Header.SetContentTypeBytes(applicationJSON)
		refused := len(b.words) - n[wordOK] - n[wordDuplicate] - n[wordReplayed]
		out = strconv.AppendInt(append(out, `{"ok":`...), int64(n[wordOK]), 10)
		out = strconv.AppendInt(append(out, `,"duplicate":`...), int64(n[wordDuplicate]), 10)
		out = strconv.AppendInt(append(out, `,"replayed":`...), int64(n[wordReplayed]), 10)
		out = strconv.AppendInt(append(out, `,"refused":`...), int64(refused), 10)
		out = append(out, `,"results":[`...)
	}
	for _, w := range b.words {
		out = append(out, texts[w]...)
	}
	if f != formatText {
		out = append(bytes.TrimSuffix(out, []byte(",")), "]}"...)
	}
	if b.owner.server.cfg.WindowHeader {
		b.setWindows(r)
	}
	r.SetBodyRaw(out) // not copied: b keeps it until the answer is written
}

var applicationJSON = []byte("application/json")

// setWindows names in a header the windows in which ids were judged. If there are several, each
// has its number of ids. A replay is in the window that counted its id.
func (b *batch) setWindows(r *fasthttp.Response) {
	type window struct {
		start time.Time
		label []byte
		ids   int
	}
	var list []window
	for i := range b.work.items {
		if b.work.verdicts[i] > dedup.ReplayedAfter {
			continue
		}
		start, label := judgedIn(b.work.verdicts[i], b.work.epochs[i])
		at := slices.IndexFunc(list, func(w window) bool { return w.start.Equal(start) })
		if at < 0 {
			at = len(list)
			list = append(list, window{start: start, label: label})
		}
		list[at].ids++
	}
	clear(b.work.epochs)
	slices.SortFunc(list, func(a, b window) int { return a.start.Compare(b.start) })
	var value []byte
	for i, w := range list {
		if i > 0 {
			value = append(value, ", "...)
		}
		value = append(value, w.label...)
		if len(list) > 1 {
			value = strconv.AppendInt(append(value, ";n="...), int64(w.ids), 10)
		}
	}
	if len(value) > 0 {
		r.Header.SetCanonical(headerWindow, value)
	}
}
