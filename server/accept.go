package server

import (
	"errors"
	"io"

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
// body, unless it goes where one is taken. fasthttp writes the answer and closes.
func (s *Server) expect(ctx *fasthttp.RequestCtx) int {
	h := &ctx.Request.Header
	if path, _, _ := splitTarget(h.RequestURI()); ctx.IsPost() {
		_, _, unfit := s.batches.head(h)
		if string(path) == SinkPath || string(path) == acceptPath && unfit == nil {
			return fasthttp.StatusContinue
		}
	}
	s.handle(ctx)
	return ctx.Response.StatusCode()
}

// accept counts the id of a request. Everything the request says is checked, and a
// place for its callback reserved, before the set is touched: a request refused
// with 4xx or 503 has counted nothing.
func (s *Server) accept(ctx *fasthttp.RequestCtx, raw []byte, lines headerLines) {
	h := &ctx.Request.Header
	body := lines.encoding || h.ContentLength() > 0 // chunks even if they are empty
	if s.preflight(ctx) {
		return
	}
	page := s.allowOrigin(ctx)
	switch {
	case !h.IsGet() && !h.IsPost():
		ctx.Response.Header.Set(fasthttp.HeaderAllow, "GET, POST")
		s.refuse(ctx, fasthttp.StatusMethodNotAllowed, reasonMethod)
		return
	case h.ContentLength() > s.http.MaxRequestBodySize:
		s.refuseAndClose(ctx, fasthttp.StatusRequestEntityTooLarge, reasonTooLarge)
		return
	case body && h.IsGet():
		s.refuseAndClose(ctx, fasthttp.StatusBadRequest, reasonBadRequest)
		return
	}

	var endpoint callback.Endpoint
	var wanted bool // a callback
	id, simple := plainID(raw)
	if !simple {
		q, err := parseQuery(raw, nil)
		if q.endpoint != nil {
			var bad error
			if endpoint, bad = s.callbacks.Parse(q.endpoint); bad != nil {
				err = errBadEndpoint
			}
			wanted = len(h.Peek(callback.Header)) == 0 // callbacks do not start callbacks
		}
		switch {
		case errors.Is(err, errBadEndpoint):
			s.refuse(ctx, fasthttp.StatusBadRequest, reasonBadEndpoint)
			return
		case body && errors.Is(err, errNoID):
			s.batches.serve(ctx, endpoint, wanted)
			return
		case h.ContentLength() == 0 && errors.Is(err, errNoID): // an empty batch
			s.refuse(ctx, fasthttp.StatusBadRequest, reasonBadRequest)
			return
		case err != nil:
			s.refuse(ctx, fasthttp.StatusBadRequest, reasonBadID)
			return
		}
		id = q.id
	}
	if body { // and an id in the query: which of them is meant?
		s.refuseAndClose(ctx, fasthttp.StatusBadRequest, reasonBadRequest)
		return
	}
	if s.cfg.Uint64IDs && !canonicalUint64(id) {
		s.refuse(ctx, fasthttp.StatusBadRequest, reasonBadID)
		return
	}
	if wanted && !s.callbacks.Reserve(endpoint) {
		s.refuse(ctx, fasthttp.StatusServiceUnavailable, reasonBusy)
		return
	}

	w := works.Get().(*work)
	defer works.Put(w)
	if err := s.count(ctx, w, id, endpoint, wanted); err != nil {
		s.refuseError(ctx, err)
		return
	}
	s.answer(&ctx.Response, w.verdicts[0], w.epochs[0])
	if simple && !page && h.IsGet() && h.IsHTTP11() && h.ContentLength() == noBody && !h.ConnectionClose() && !ctx.Request.MayContinue() {
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

// count judges one id. The callback for which a place is reserved is sent for a new
// id, and its place is given back otherwise, also after a panic.
func (s *Server) count(ctx *fasthttp.RequestCtx, w *work, id []byte, endpoint callback.Endpoint, reserved bool) error {
	if reserved {
		defer func() {
			if w.verdicts[0] == dedup.Unique {
				s.callbacks.Send(endpoint)
			} else {
				s.callbacks.Release(endpoint)
			}
		}()
	}
	w.reset(1)
	w.verdicts[0] = dedup.Turned
	w.items, w.keyed = append(w.items, dedup.Item{ID: id, Key: s.cfg.Set.Key(id, nil)}), 1
	err := s.judge(ctx.Time().UnixNano(), ctx.ConnID(), w, 0, 1) // the time of the end of the request's headers
	if err == nil && w.verdicts[0] == dedup.Turned {
		return errDraining
	}
	return err
}

// sink is the built-in receiver of callbacks. It reads the body and keeps nothing.
func (s *Server) sink(ctx *fasthttp.RequestCtx) {
	h := &ctx.Request.Header
	if !h.IsPost() {
		ctx.Response.Header.Set(fasthttp.HeaderAllow, fasthttp.MethodPost)
		s.refuse(ctx, fasthttp.StatusMethodNotAllowed, reasonMethod)
		return
	}
	if body := ctx.RequestBodyStream(); body != nil {
		n, err := io.Copy(io.Discard, io.LimitReader(body, maxBody+1))
		if err == nil && n > maxBody {
			err = fasthttp.ErrBodyTooLarge
		}
		if err != nil {
			ctx.SetConnectionClose()
			s.refuseBroken(ctx, err)
			return
		}
	}
	s.sunk.Add(1)
	setHead(&ctx.Response)
	ctx.Response.SetBodyRaw(bodyOK)
}

// noBody is fasthttp's content length of a request that says nothing of a body.
const noBody = -2
