package server

import (
	"errors"
	"net"
	"runtime/debug"
	"time"

	"github.com/valyala/fasthttp"

	"verve/dedup"
)

var (
	headerCache    = []byte(fasthttp.HeaderCacheControl)
	valueNoStore   = []byte("no-store")
	headerReason   = []byte("Verve-Reason")
	headerWindow   = []byte("Verve-Window")
	valueDuplicate = []byte("duplicate") // the reason of a repeat, which is counted in its epoch
)

const (
	// retryAfter is what a refused caller is asked to wait, in seconds: the
	// least the header can say. Overload passes sooner.
	retryAfter = "1"
)

// errDraining says that the counter takes no more requests.
var errDraining = errors.New("draining")

// reason is one value of the Verve-Reason header and its place in refused.
type reason struct {
	index int
	value string
}

// The reasons of refusals. Their values are part of the contract.
var (
	reasonBadID       = reason{0, "bad-id"}
	reasonBadEndpoint = reason{1, "bad-endpoint"}
	reasonBadRequest  = reason{2, "bad-request"}
	reasonVersion     = reason{2, ""} // the status says it all
	reasonMethod      = reason{3, "method"}
	reasonNotFound    = reason{4, "not-found"}
	reasonFull        = reason{5, "full"}
	reasonUnavailable = reason{6, "unavailable"}
	reasonBusy        = reason{7, "busy"}
	reasonDraining    = reason{8, "draining"}
	reasonTooLarge    = reason{9, ""} // as the next ones
	reasonTooSlow     = reason{10, ""}
	reasonPanic       = reason{11, ""}
)

const reasons = 12

// setHead sets what all answers have. A cache that stored one would give it to
// other callers, whose ids would not be counted.
func setHead(r *fasthttp.Response) {
	r.Header.SetContentTypeBytes(textPlain)
	r.Header.SetCanonical(headerCache, valueNoStore)
}

// refuse answers failed and counts why.
func (s *Server) refuse(ctx *fasthttp.RequestCtx, status int, r reason) {
	s.refused[r.index].Add(1)
	ctx.Response.SetStatusCode(status)
	setHead(&ctx.Response)
	if r.value != "" {
		ctx.Response.Header.SetCanonical(headerReason, []byte(r.value))
	}
	if status == fasthttp.StatusServiceUnavailable {
		ctx.Response.Header.Set(fasthttp.HeaderRetryAfter, retryAfter)
	}
	ctx.Response.SetBodyRaw(bodyFailed)
}

// refuseError answers a request that the set could not judge.
func (s *Server) refuseError(ctx *fasthttp.RequestCtx, err error) {
	switch {
	case errors.Is(err, errDraining):
		ctx.SetConnectionClose()
		s.refuse(ctx, fasthttp.StatusServiceUnavailable, reasonDraining)
	case errors.Is(err, dedup.ErrFull):
		s.refuse(ctx, fasthttp.StatusServiceUnavailable, reasonFull)
	default:
		s.refuse(ctx, fasthttp.StatusServiceUnavailable, reasonUnavailable)
	}
}

// refuseAndClose answers a request behind which nothing can be relied on to be one.
func (s *Server) refuseAndClose(ctx *fasthttp.RequestCtx, status int, r reason) {
	ctx.SetConnectionClose()
	s.refuse(ctx, status, r)
}

// overHTTP2 reports whether a connection begins as one of HTTP/2.
func overHTTP2(nc net.Conn) bool {
	c, ok := nc.(*conn)
	return ok && c.h2 && c.taken >= len(h2Preface)
}

// refuseBroken answers what fasthttp could not read as a request. It closes the
// connection after the answer.
func (s *Server) refuseBroken(ctx *fasthttp.RequestCtx, err error) {
	var small *fasthttp.ErrSmallBuffer
	var timeout net.Error
	switch {
	case overHTTP2(ctx.Conn()):
		s.refuse(ctx, fasthttp.StatusHTTPVersionNotSupported, reasonVersion)
	case errors.As(err, &small):
		s.refuse(ctx, fasthttp.StatusRequestHeaderFieldsTooLarge, reasonTooLarge)
	case errors.Is(err, fasthttp.ErrBodyTooLarge):
		s.refuse(ctx, fasthttp.StatusRequestEntityTooLarge, reasonTooLarge)
	case errors.As(err, &timeout) && timeout.Timeout():
		s.refuse(ctx, fasthttp.StatusRequestTimeout, reasonTooSlow)
	default:
		s.refuse(ctx, fasthttp.StatusBadRequest, reasonBadRequest)
	}
}

// recovered turns a panic into one failed request: fasthttp itself would let
// it end the process. The connection's state is unknown, so it is closed.
func (s *Server) recovered(ctx *fasthttp.RequestCtx) {
	p := recover()
	if p == nil {
		return
	}
	// Whoever finds a request that panics will send more of them.
	if hidden, ok := s.panicLog.allow(time.Now()); ok {
		s.cfg.Log.Error().Interface("panic", p).Bytes("stack", debug.Stack()).Uint64("hidden", hidden).Msg("a request panicked")
	}
	ctx.Response.Reset()
	ctx.SetConnectionClose()
	s.refuse(ctx, fasthttp.StatusInternalServerError, reasonPanic)
}
