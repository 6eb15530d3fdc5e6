package server

import (
	"errors"

	"github.com/valyala/fasthttp"

	"verve/counter"
	"verve/dedup"
	"verve/server/callback"
)

var (
	bodyOK     = []byte("ok")
	bodyFailed = []byte("failed")
	textPlain  = []byte("text/plain")
)

// handle answers one request: the route by the path as it was sent, then the
// method, then the rest. fasthttp reads the request before and writes the
// answer after it.
func (s *Server) handle(ctx *fasthttp.RequestCtx) {
	defer s.recovered(ctx)
	if s.leaving.Load() {
		ctx.SetConnectionClose()
	}
	h := &ctx.Request.Header
	if !h.IsHTTP11() && string(h.Protocol()) != "HTTP/1.0" {
		s.refuseAndClose(ctx, fasthttp.StatusHTTPVersionNotSupported, reasonVersion)
		return
	}
	lines, ok := inspect(h)
	path, raw, known := splitTarget(h.RequestURI())
	if !ok || !known {
		s.refuseAndClose(ctx, fasthttp.StatusBadRequest, reasonBadRequest)
		return
	}
	switch string(path) {
	case acceptPath:
		s.accept(ctx, raw, lines)
	case SinkPath:
		s.sink(ctx)
	default:
		s.refuse(ctx, fasthttp.StatusNotFound, reasonNotFound)
	}
}

// expect answers a request with "Expect: 100-continue" without asking for its
// body, unless it goes to the sink. fasthttp writes the answer and closes.
func (s *Server) expect(ctx *fasthttp.RequestCtx) int {
	if path, _, _ := splitTarget(ctx.Request.Header.RequestURI()); ctx.IsPost() && string(path) == SinkPath {
		return fasthttp.StatusContinue
	}
	s.handle(ctx)
	return ctx.Response.StatusCode()
}

// accept counts the id of a request. Everything the request says is checked, and a
// place for its callback reserved, before the set is touched: a request refused
// with 4xx or 503 has counted nothing.
func (s *Server) accept(ctx *fasthttp.RequestCtx, raw []byte, lines headerLines) {
	h := &ctx.Request.Header
	switch {
	case !h.IsGet() && !h.IsPost():
		ctx.Response.Header.Set(fasthttp.HeaderAllow, "GET, POST")
		s.refuse(ctx, fasthttp.StatusMethodNotAllowed, reasonMethod)
		return
	case lines.encoding || h.ContentLength() > 0: // a body, or chunks, even if they were empty
		s.refuseAndClose(ctx, fasthttp.StatusBadRequest, reasonBadRequest)
		return
	}

	var endpoint callback.Endpoint
	var wanted bool // a callback
	id, simple := plainID(raw)
	if !simple {
		q, err := parseQuery(raw, nil)
		if err == nil && q.endpoint != nil {
			endpoint, err = s.callbacks.Parse(q.endpoint)
			wanted = len(h.Peek(callback.Header)) == 0 // callbacks do not start callbacks
			if err != nil {
				err = errBadEndpoint
			}
		}
		switch {
		case errors.Is(err, errBadEndpoint):
			s.refuse(ctx, fasthttp.StatusBadRequest, reasonBadEndpoint)
			return
		case err != nil:
			s.refuse(ctx, fasthttp.StatusBadRequest, reasonBadID)
			return
		}
		id = q.id
	}
	if s.cfg.Uint64IDs && !canonicalUint64(id) {
		s.refuse(ctx, fasthttp.StatusBadRequest, reasonBadID)
		return
	}
	if wanted && !s.callbacks.Reserve(endpoint) {
		s.refuse(ctx, fasthttp.StatusServiceUnavailable, reasonBusy)
		return
	}

	var verdict dedup.Verdict
	var epoch *counter.Epoch
	var err error
	if wanted {
		verdict, epoch, err = s.countAndCall(ctx, id, endpoint)
	} else {
		verdict, epoch, err = s.count(ctx, id)
	}
	if err != nil {
		s.refuseError(ctx, err)
		return
	}
	s.answer(&ctx.Response, verdict, epoch)
	if simple && s.ln.fast != nil && h.IsGet() && h.IsHTTP11() && h.ContentLength() == noBody && !h.ConnectionClose() && !ctx.Request.MayContinue() {
		ctx.Conn().(*conn).learn(h) // every connection comes from s.ln
	}
}

// answer says what the set has said of an id in an epoch.
func (s *Server) answer(r *fasthttp.Response, verdict dedup.Verdict, epoch *counter.Epoch) {
	setHead(r)
	if s.cfg.WindowHeader {
		r.Header.SetCanonical(headerWindow, epoch.Label())
	}
	if verdict == dedup.Repeat {
		r.SetStatusCode(s.cfg.DuplicateStatus)
		r.Header.SetCanonical(headerReason, valueDuplicate)
		r.SetBodyRaw(bodyFailed)
		return
	}
	r.SetBodyRaw(bodyOK)
}

// count asks the set about id in the open epoch and counts the verdict in the
// same epoch. Where the epoch turned meanwhile it asks again in the next.
func (s *Server) count(ctx *fasthttp.RequestCtx, id []byte) (dedup.Verdict, *counter.Epoch, error) {
	now := ctx.Time().UnixNano() // of the end of the request's headers
	key := s.cfg.Set.Key(id)
	for {
		entry, open := s.cfg.Counter.Enter(now, ctx.ConnID())
		if !open {
			return 0, nil, errDraining
		}
		verdict, err := s.addAndLeave(entry, id, key)
		if err != nil || verdict != dedup.Turned {
			return verdict, entry.Epoch, err
		}
		s.cfg.Counter.TurnFrom(entry.Epoch)
	}
}

// countAndCall is count for a request with a reserved callback: it is sent for
// a new id, and its place is given back otherwise, also after a panic.
func (s *Server) countAndCall(ctx *fasthttp.RequestCtx, id []byte, endpoint callback.Endpoint) (dedup.Verdict, *counter.Epoch, error) {
	sent := false
	defer func() {
		if !sent {
			s.callbacks.Release(endpoint)
		}
	}()
	verdict, epoch, err := s.count(ctx, id)
	if err == nil && verdict == dedup.Unique {
		sent = true
		s.callbacks.Send(endpoint)
	}
	return verdict, epoch, err
}

// addAndLeave leaves the epoch whatever happens in the set: an entry never
// left would keep its epoch from being sealed for ever.
func (s *Server) addAndLeave(entry counter.Entry, id []byte, key dedup.Key) (verdict dedup.Verdict, err error) {
	outcome := counter.Void
	defer func() { entry.Leave(outcome) }()
	verdict, err = s.cfg.Set.Add(entry.Epoch, id, key)
	switch {
	case err != nil:
	case verdict == dedup.Unique:
		outcome = counter.Unique
	case verdict == dedup.Repeat:
		outcome = counter.Repeat
	}
	return verdict, err
}

// sink is the built-in receiver of callbacks.
func (s *Server) sink(ctx *fasthttp.RequestCtx) {
	h := &ctx.Request.Header
	switch {
	case !h.IsPost():
		ctx.Response.Header.Set(fasthttp.HeaderAllow, fasthttp.MethodPost)
		s.refuse(ctx, fasthttp.StatusMethodNotAllowed, reasonMethod)
	default:
		s.sunk.Add(1)
		setHead(&ctx.Response)
		ctx.Response.SetBodyRaw(bodyOK)
	}
}

// noBody is fasthttp's content length of a request that says nothing of a body.
const noBody = -2
