package server

import (
	"bytes"
	"io"
	"time"

	"github.com/valyala/fasthttp"

	"verve/counter"
	"verve/dedup"
	"verve/server/callback"
)

// noBody is fasthttp's content length of a request without a body.
const noBody = -2

var (
	bodyOK     = []byte("ok")
	bodyFailed = []byte("failed")
	textPlain  = []byte("text/plain")
)

// handle answers one request. It first finds the route, by the path as it was sent,
// then checks the method, then the rest. fasthttp reads the request before handle and
// writes the answer after it.
func (s *Server) handle(ctx *fasthttp.RequestCtx) {
	defer s.recovered(ctx)
	if s.lastAnswers.Load() {
		ctx.SetConnectionClose()
	}
	h := &ctx.Request.Header
	lines, ok := inspect(h)
	path, raw, known := splitTarget(h.RequestURI())
	var err error
	switch {
	case !h.IsHTTP11() && string(h.Protocol()) != "HTTP/1.0":
		err = errVersion
	case !ok || !known:
		err = errBadRequest
	case string(path) == acceptPath:
		err = s.accept(ctx, raw, lines)
	case string(path) == SinkPath:
		err = s.sink(ctx)
	default:
		err = errNotFound
	}
	if err != nil {
		s.refuse(ctx, err)
	}
	if lines.encoding && ctx.Response.StatusCode() != fasthttp.StatusOK {
		ctx.SetConnectionClose() // chunks that were not read to their end were not checked
	}
}

// expect is called for a request with "Expect: 100-continue". If its route accepts the body it
// returns 100. Else it answers the request without the body, and returns the status; fasthttp
// writes the answer and closes the connection.
func (s *Server) expect(ctx *fasthttp.RequestCtx) int {
	h := &ctx.Request.Header
	if path, raw, _ := splitTarget(h.RequestURI()); ctx.IsPost() {
		_, _, unfit := s.batches.head(h)
		if unfit != nil && h.ContentLength() == inChunks { // these may be empty: then it is no batch if the query has an id
			_, unfit = parseQuery(raw, true)
		}
		if string(path) == SinkPath && h.ContentLength() <= maxBody || string(path) == acceptPath && unfit == nil {
			return fasthttp.StatusContinue
		}
	}
	s.handle(ctx)
	return ctx.Response.StatusCode()
}

// accept counts the id of a request. It checks all parts of the request, and reserves
// a place for its callback, before it adds the id to the set: a request that is refused
// with 4xx or 503 has counted nothing. The error is why a request is refused.
func (s *Server) accept(ctx *fasthttp.RequestCtx, raw []byte, lines headerLines) error {
	h := &ctx.Request.Header
	body := lines.encoding || h.ContentLength() > 0 // chunks may be empty
	if s.preflight(ctx) {
		return nil
	}
	fromPage := s.allowOrigin(ctx)
	switch {
	case !h.IsGet() && !h.IsPost():
		ctx.Response.Header.Set(fasthttp.HeaderAllow, "GET, POST")
		return errMethod
	case h.ContentLength() > s.http.MaxRequestBodySize:
		return errTooLarge
	case body && h.IsGet():
		return errBadRequest
	}

	var a asked
	emptyBatch := h.IsPost() && h.ContentLength() == 0 // unless there is an id
	err := s.parse(&a, h, raw, lines, !body && !emptyBatch)
	switch {
	case err != nil:
		return err
	case a.id == nil && body && lines.types > 1: // it is not clear which type is meant
		return errUnsupported
	case a.id == nil && body:
		return s.batches.serve(ctx, &a)
	case a.id == nil:
		return errNothing
	case body && !(lines.encoding && isEmpty(bodyOf(ctx))): // and an id in the query: it is not clear which is meant
		return errBadRequest
	case a.wanted && !s.cfg.Callbacks.Reserve(a.endpoint):
		return errNoPlace
	}

	w := works.Get().(*work)
	defer works.Put(w)
	if err := s.count(ctx, w, &a); err != nil {
		return err
	}
	s.answer(&ctx.Response, w.verdicts[0], w.epochs[0])
	// The next request may be the same but for its id: the fast path answers it.
	if a.plain && !fromPage && h.IsGet() && h.IsHTTP11() && h.ContentLength() == noBody && !h.ConnectionClose() && !ctx.Request.MayContinue() {
		ctx.Conn().(*conn).learn(h) // every connection comes from s.ln
	}
	return nil
}

// isEmpty reports whether a body in chunks has no bytes. If it has some, the first is lost.
func isEmpty(body io.Reader) bool {
	if body == nil {
		return false
	}
	var one [1]byte
	_, err := io.ReadFull(body, one[:])
	return err == io.EOF
}

// asked is what a request asks for in its query and its headers.
type asked struct {
	id       []byte            // nil: there is none in the query
	plain    bool              // the query is as plainQuery reads it, and there is no Idempotency-Key
	endpoint callback.Endpoint // see wanted
	wanted   bool              // a callback to endpoint is
	options  dedup.Options     // of the id, or of each id in the body
}

// parse reads into a, which is empty, what a request asks for in its query and its headers.
// If there are several faults, the error is the first in the order id, endpoint, key, token.
func (s *Server) parse(a *asked, h *fasthttp.RequestHeader, raw []byte, lines headerLines, needsID bool) (err error) {
	id, ok := plainQuery(raw, &a.options)
	if ok && lines.tokens == 0 {
		if s.cfg.Uint64IDs && !canonicalUint64(id) {
			return errBadID
		}
		a.id, a.plain = id, true
		return nil
	}
	q, err := parseQuery(raw, needsID)
	if q.id != nil && s.cfg.Uint64IDs && !canonicalUint64(q.id) {
		return errBadID
	}
	if q.endpoint != nil {
		var bad error
		if a.endpoint, bad = s.cfg.Callbacks.Parse(q.endpoint); bad != nil {
			return errBadEndpoint
		}
		a.wanted = len(h.Peek(callback.Header)) == 0 // callbacks do not start callbacks
	}
	if err == nil && lines.tokens > 0 {
		token := tokenOf(lines.token)
		if lines.tokens > 1 || !validToken(token) || q.token != nil && !bytes.Equal(token, q.token) {
			err = errBadToken
		}
		q.token = token
	}
	a.id, a.options = q.id, dedup.Options{Under: q.key, Token: q.token}
	return err
}

// answer writes the verdict of the set on an id. epoch is the one in which it was given.
func (s *Server) answer(r *fasthttp.Response, verdict dedup.Verdict, epoch *counter.Epoch) {
	setHead(r)
	if s.cfg.WindowHeader {
		_, label := judgedIn(verdict, epoch)
		r.Header.SetCanonical(headerWindow, label)
	}
	switch verdict {
	case dedup.Repeat:
		r.SetStatusCode(s.cfg.DuplicateStatus)
		r.Header.SetCanonical(headerReason, valueDuplicate)
		r.SetBodyRaw(bodyFailed)
		return
	case dedup.Replayed, dedup.ReplayedBefore, dedup.ReplayedAfter:
		r.Header.SetCanonical(headerReplayed, valueTrue)
	}
	r.SetBodyRaw(bodyOK)
}

// judgedIn returns the start of the window in which an id was counted or repeated, also as the
// text in an answer. e is the epoch of its verdict.
func judgedIn(v dedup.Verdict, e *counter.Epoch) (start time.Time, label []byte) {
	switch v {
	case dedup.ReplayedBefore:
		start = e.Before()
	case dedup.ReplayedAfter:
		start = e.End()
	default:
		return e.Start(), e.Label()
	}
	return start, start.AppendFormat(nil, time.RFC3339Nano)
}

// count judges one id. If a place for a callback is reserved, it sends the callback for a new
// id, and gives the place back otherwise, also after a panic.
func (s *Server) count(ctx *fasthttp.RequestCtx, w *work, a *asked) error {
	if a.wanted {
		defer func() {
			if w.verdicts[0] == dedup.Unique {
				s.cfg.Callbacks.Send(a.endpoint)
			} else {
				s.cfg.Callbacks.Release(a.endpoint)
			}
		}()
	}
	w.reset(1)
	w.verdicts[0] = dedup.Turned
	options := w.sharing(&a.options)
	w.items, w.keyed = append(w.items, dedup.Item{ID: a.id, Options: options}), 1
	s.cfg.Set.Keys(w.items)
	err := s.judge(ctx.Time().UnixNano(), ctx.ConnID(), w) // ctx.Time is when the headers had arrived
	if v := w.verdicts[0]; v.IsReplay() {
		s.replayed.Add(1)
	} else if err == nil && v == dedup.Turned {
		return errDraining
	}
	return err
}

// sink is the built-in receiver of callbacks. It reads the body and keeps nothing.
func (s *Server) sink(ctx *fasthttp.RequestCtx) error {
	h := &ctx.Request.Header
	if !h.IsPost() {
		ctx.Response.Header.Set(fasthttp.HeaderAllow, fasthttp.MethodPost)
		return errMethod
	}
	if h.ContentLength() > maxBody {
		return errTooLarge
	}
	if body := bodyOf(ctx); body != nil {
		n, err := io.Copy(io.Discard, io.LimitReader(body, maxBody+1))
		if err == nil && n > maxBody {
			err = fasthttp.ErrBodyTooLarge
		}
		if err != nil {
			return broken(ctx, err)
		}
	}
	s.sunk.Add(1)
	setHead(&ctx.Response)
	ctx.Response.SetBodyRaw(bodyOK)
	return nil
}
