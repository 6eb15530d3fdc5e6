package server

import (
	"errors"
	"net"
	"time"

	"github.com/rs/zerolog"
	"github.com/valyala/fasthttp"

	"verve/dedup"
)

var (
	headerCache    = []byte(fasthttp.HeaderCacheControl)
	valueNoStore   = []byte("no-store")
	headerReason   = []byte("Verve-Reason")
	headerWindow   = []byte("Verve-Window")
	headerReplayed = []byte("Verve-Replayed")
	valueTrue      = []byte("true")
	valueDuplicate = []byte("duplicate") // the reason of a repeat, which is counted in its epoch
)

const (
	// retryAfter is what a refused caller is asked to wait, in seconds: the
	// least the header can hold. Overload passes sooner.
	retryAfter = "1"

	// refusalsEvery samples the log of refusals, cause by cause.
	refusalsEvery = 10 * time.Second
)

// reason is why requests are refused.
type reason uint8

const (
	reasonBadID reason = iota
	reasonBadEndpoint
	reasonBadKey
	reasonBadToken
	reasonBadRequest
	reasonMethod
	reasonNotFound
	reasonFull
	reasonUnavailable
	reasonBusy
	reasonDraining
	reasonTooLarge // from here on the status is all that is answered
	reasonTooSlow
	reasonPanic
	reasons
)

// reasonNames are the values of Verve-Reason, which are part of the contract, and the
// names in the log.
var reasonNames = [reasons]string{
	"bad-id", "bad-endpoint", "bad-key", "bad-token", "bad-request", "method", "not-found",
	"full", "unavailable", "busy", "draining", "too-large", "too-slow", "panic",
}

func (r reason) String() string { return reasonNames[r] }

// refusal is the error of a request that is to be refused, and its answer.
type refusal struct {
	status int
	reason reason
}

func (r refusal) Error() string { return r.reason.String() }

var (
	// The faults of a query. If it has several, the answer names the first in this order.
	errBadID       = refusal{fasthttp.StatusBadRequest, reasonBadID}
	errBadEndpoint = refusal{fasthttp.StatusBadRequest, reasonBadEndpoint}
	errBadKey      = refusal{fasthttp.StatusBadRequest, reasonBadKey}
	errBadToken    = refusal{fasthttp.StatusBadRequest, reasonBadToken}

	errBadBatch    = refusal{fasthttp.StatusBadRequest, reasonBadRequest}
	errUnsupported = refusal{fasthttp.StatusUnsupportedMediaType, reasonBadRequest} // a type or an encoding
	errTooLarge    = refusal{fasthttp.StatusRequestEntityTooLarge, reasonTooLarge}
	errBusy        = refusal{fasthttp.StatusServiceUnavailable, reasonBusy} // too much memory is in use by batches

	errDraining = refusal{fasthttp.StatusServiceUnavailable, reasonDraining} // the counter is sealed
	errPanicked = refusal{fasthttp.StatusInternalServerError, reasonPanic}   // the set did
)

// setHead sets what all answers have. A cache that stored one would give it to
// other callers, whose ids would not be counted.
func setHead(r *fasthttp.Response) {
	r.Header.SetContentTypeBytes(textPlain)
	r.Header.SetCanonical(headerCache, valueNoStore)
}

// refuse answers failed and counts why.
func (s *Server) refuse(ctx *fasthttp.RequestCtx, status int, r reason) {
	s.refuseBecause(ctx, status, r, nil)
}

// refuseBecause is refuse with the error that is behind it.
func (s *Server) refuseBecause(ctx *fasthttp.RequestCtx, status int, r reason, cause error) {
	s.countRefusals(status, r, 1, cause)
	setRefusal(&ctx.Response, status, r)
}

// countRefusals counts n refusals, and logs the first of a cause in a while. What the
// request holds is not logged: any caller can write it.
func (s *Server) countRefusals(status int, r reason, n uint64, cause error) {
	s.refused[r].Add(n)
	if r == reasonPanic {
		return // has a line of its own
	}
	if hidden, ok := s.refusalLogs[r].Allow(time.Now()); ok {
		s.refusalLine(r).Int("status", status).Uint64("hidden", hidden).Err(cause).Msg("a request was refused")
	}
}

// setRefusal makes r an answer of refusal.
func setRefusal(r *fasthttp.Response, status int, why reason) {
	r.SetStatusCode(status)
	setHead(r)
	if why < reasonTooLarge && status != fasthttp.StatusHTTPVersionNotSupported {
		r.Header.SetCanonical(headerReason, []byte(why.String()))
	}
	if status == fasthttp.StatusServiceUnavailable {
		r.Header.Set(fasthttp.HeaderRetryAfter, retryAfter)
	}
	r.SetBodyRaw(bodyFailed)
}

// logHiddenRefusals logs how many refusals were not logged, if no later one has reported
// that.
func (s *Server) logHiddenRefusals() {
	for r := range reasons {
		if n := s.refusalLogs[r].TakeHidden(); n > 0 {
			s.refusalLine(r).Uint64("hidden", n).Msg("refused requests not logged")
		}
	}
	if n := s.ln.rejections.TakeHidden(); n > 0 {
		s.refusalLine(reasonBusy).Uint64("hidden", n).Msg("refused connections not logged")
	}
}

// refusalLine is a warning if the server is the cause: the request may be as good as
// any.
func (s *Server) refusalLine(r reason) *zerolog.Event {
	level := zerolog.InfoLevel
	if r == reasonFull || r == reasonUnavailable || r == reasonBusy {
		level = zerolog.WarnLevel
	}
	return s.cfg.Log.WithLevel(level).Stringer("reason", r)
}

// refusalReason is the reason of a verdict of refusal.
func refusalReason(v dedup.Verdict) reason {
	if v == dedup.Full {
		return reasonFull
	}
	return reasonUnavailable
}

// refuseError answers a request that the set could not judge.
func (s *Server) refuseError(ctx *fasthttp.RequestCtx, err error) {
	r, ok := errors.AsType[refusal](err)
	switch {
	case ok: // draining, or a panic
		s.refuseAndClose(ctx, r.status, r.reason)
	case errors.Is(err, dedup.ErrTooManyKeys):
		s.refuseBecause(ctx, fasthttp.StatusServiceUnavailable, reasonFull, err)
	case errors.Is(err, dedup.ErrFull):
		s.refuse(ctx, fasthttp.StatusServiceUnavailable, reasonFull)
	default:
		s.refuseBecause(ctx, fasthttp.StatusServiceUnavailable, reasonUnavailable, err)
	}
}

// refuseAndClose answers a request behind which nothing can be relied on to be one.
func (s *Server) refuseAndClose(ctx *fasthttp.RequestCtx, status int, r reason) {
	ctx.SetConnectionClose()
	s.refuse(ctx, status, r)
}

// refuseBroken answers what fasthttp could not read as a request. It closes the
// connection after the answer.
func (s *Server) refuseBroken(ctx *fasthttp.RequestCtx, err error) {
	var small *fasthttp.ErrSmallBuffer
	var timeout net.Error
	c := ctx.Conn().(*conn) // every connection comes from s.ln
	switch {
	case c.h2 && c.taken >= len(h2Preface):
		s.refuse(ctx, fasthttp.StatusHTTPVersionNotSupported, reasonBadRequest)
	case errors.As(err, &small):
		s.refuse(ctx, fasthttp.StatusRequestHeaderFieldsTooLarge, reasonTooLarge)
	case errors.Is(err, fasthttp.ErrBodyTooLarge):
		s.refuse(ctx, fasthttp.StatusRequestEntityTooLarge, reasonTooLarge)
	case errors.As(err, &timeout) && timeout.Timeout(), c.stopped.Load(): // fasthttp's error of a body in chunks hides it
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
	s.logPanic(p)
	ctx.Response.Reset()
	ctx.SetConnectionClose()
	s.refuse(ctx, fasthttp.StatusInternalServerError, reasonPanic)
}
