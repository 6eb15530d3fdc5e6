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

	// refusalsEvery is how often refusals are logged, for each reason.
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
	reasonTooLarge // from here on the answer has no Verve-Reason, only the status
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
	last   bool // what follows the request may not be a request: its connection is closed
}

func (r refusal) Error() string { return r.reason.String() }

var (
	// The faults of a query. If it has several, the answer names the first in this order.
	errBadID       = refusal{fasthttp.StatusBadRequest, reasonBadID, false}
	errBadEndpoint = refusal{fasthttp.StatusBadRequest, reasonBadEndpoint, false}
	errBadKey      = refusal{fasthttp.StatusBadRequest, reasonBadKey, false}
	errBadToken    = refusal{fasthttp.StatusBadRequest, reasonBadToken, false}

	errNothing     = refusal{fasthttp.StatusBadRequest, reasonBadRequest, false} // neither an id nor a body
	errNotFound    = refusal{fasthttp.StatusNotFound, reasonNotFound, false}
	errMethod      = refusal{fasthttp.StatusMethodNotAllowed, reasonMethod, false}
	errNoPlace     = refusal{fasthttp.StatusServiceUnavailable, reasonBusy, false} // for its callback
	errFull        = refusal{fasthttp.StatusServiceUnavailable, reasonFull, false}
	errUnavailable = refusal{fasthttp.StatusServiceUnavailable, reasonUnavailable, false}

	errBadRequest  = refusal{fasthttp.StatusBadRequest, reasonBadRequest, true}
	errVersion     = refusal{fasthttp.StatusHTTPVersionNotSupported, reasonBadRequest, true}
	errUnsupported = refusal{fasthttp.StatusUnsupportedMediaType, reasonBadRequest, true} // a type or an encoding
	errTooLarge    = refusal{fasthttp.StatusRequestEntityTooLarge, reasonTooLarge, true}
	errHeaders     = refusal{fasthttp.StatusRequestHeaderFieldsTooLarge, reasonTooLarge, true}
	errTooSlow     = refusal{fasthttp.StatusRequestTimeout, reasonTooSlow, true}
	errBusy        = refusal{fasthttp.StatusServiceUnavailable, reasonBusy, true}     // too much memory is in use by batches
	errDraining    = refusal{fasthttp.StatusServiceUnavailable, reasonDraining, true} // the counter is sealed
	errPanicked    = refusal{fasthttp.StatusInternalServerError, reasonPanic, true}   // the set or the handler did
)

// setHead sets what all answers have. A cache that stored one would give it to
// other callers, whose ids would not be counted.
func setHead(r *fasthttp.Response) {
	r.Header.SetContentTypeBytes(textPlain)
	r.Header.SetCanonical(headerCache, valueNoStore)
}

// refuse answers failed and counts why: err is a refusal, or the reason why the set could not
// judge the id.
func (s *Server) refuse(ctx *fasthttp.RequestCtx, err error) {
	r, ok := errors.AsType[refusal](err)
	switch {
	case ok:
		err = nil // it has no cause
	case errors.Is(err, dedup.ErrTooManyKeys):
		r = errFull
	case errors.Is(err, dedup.ErrFull):
		r, err = errFull, nil
	default:
		r = errUnavailable
	}
	if r.last {
		ctx.SetConnectionClose()
	}
	s.countRefusals(r, 1, err)
	setRefusal(&ctx.Response, r)
}

// countRefusals counts n refusals, and logs one of each reason per refusalsEvery. The content
// of the request is not logged: callers could write anything into the log.
func (s *Server) countRefusals(r refusal, n uint64, cause error) {
	s.refused[r.reason].Add(n)
	if r.reason == reasonPanic {
		return // logPanic logs it
	}
	if hidden, ok := s.refusalLogs[r.reason].Allow(time.Now()); ok {
		s.refusalLine(r.reason).Int("status", r.status).Uint64("hidden", hidden).Err(cause).Msg("a request was refused")
	}
}

// setRefusal makes r the answer of a refusal.
func setRefusal(r *fasthttp.Response, why refusal) {
	r.SetStatusCode(why.status)
	setHead(r)
	if why.reason < reasonTooLarge && why != errVersion {
		r.Header.SetCanonical(headerReason, []byte(why.reason.String()))
	}
	if why.status == fasthttp.StatusServiceUnavailable {
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

// refusalLine begins a line of the log: a warning if the server is the cause, because then
// the request may be right.
func (s *Server) refusalLine(r reason) *zerolog.Event {
	level := zerolog.InfoLevel
	if r == reasonFull || r == reasonUnavailable || r == reasonBusy {
		level = zerolog.WarnLevel
	}
	return s.cfg.Log.WithLevel(level).Stringer("reason", r)
}

// refusalOf returns the refusal of an id with this verdict, which is Full or Unavailable.
func refusalOf(v dedup.Verdict) refusal {
	if v == dedup.Full {
		return errFull
	}
	return errUnavailable
}

// broken returns the refusal of a request that fasthttp, or a handler, could not read to its
// end.
func broken(ctx *fasthttp.RequestCtx, err error) refusal {
	var small *fasthttp.ErrSmallBuffer
	var timeout net.Error
	c := ctx.Conn().(*conn) // every connection comes from s.ln
	r, ok := errors.AsType[refusal](err)
	switch {
	case ok:
		return r
	case c.h2 && c.taken >= len(h2Preface):
		return errVersion
	case errors.As(err, &small):
		return errHeaders
	case errors.Is(err, fasthttp.ErrBodyTooLarge):
		return errTooLarge
	case errors.As(err, &timeout) && timeout.Timeout(), c.stopped.Load(): // fasthttp's error of a body in chunks hides it
		return errTooSlow
	default:
		return errBadRequest
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
	s.refuse(ctx, errPanicked)
}
