package server

import (
	"errors"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/valyala/fasthttp"
)

// A page may read the answers to its requests only if its origin is allowed
// (https://fetch.spec.whatwg.org/#http-cors-protocol). None is by default. Requests
// are counted either way: CORS protects pages' readers, not servers.

// exposed are the headers of an answer that a page may read.
const exposed = "Verve-Reason, Verve-Replayed, Verve-Window, Retry-After"

// preflightAge is how long a browser may remember that it may send requests, in seconds: the
// longest time that Chromium accepts.
const preflightAge = "7200"

// checkOrigin refuses an entry of the allow-list that is neither "*" nor an origin as browsers
// send it, byte by byte. In another spelling it would never match.
func checkOrigin(origin string) error {
	if origin == "*" {
		return nil
	}
	u, err := url.Parse(origin)
	if err != nil || u.Scheme == "" || u.Host == "" || origin != u.Scheme+"://"+u.Host {
		return errors.New("want * or an origin such as https://example.com, without a path")
	}
	if strings.Contains(u.Host, "*") {
		return errors.New("want * alone for all origins, or each by itself: there are no patterns")
	}
	if u.Scheme != "http" && u.Scheme != "https" {
		return nil // of an extension
	}
	for _, c := range []byte(u.Host) {
		if 'A' <= c && c <= 'Z' || c >= 0x80 {
			return errors.New("want the host as browsers send it, in lower case, other letters than a to z as xn--…")
		}
	}
	if strings.HasSuffix(u.Host, ":") || u.Port() != "" && !sentPort(u.Scheme, u.Port()) {
		return errors.New("want a port only if it is not that of http (80) or https (443), up to 65535")
	}
	return nil
}

// sentPort reports whether browsers send a port with an origin.
func sentPort(scheme, port string) bool {
	n, err := strconv.ParseUint(port, 10, 16)
	standard := map[string]uint64{"http": 80, "https": 443}[scheme]
	return err == nil && n > 0 && n != standard && strconv.FormatUint(n, 10) == port
}

// allowOrigin lets the page that sent the request read its answer, if its origin is on
// the list. It reports whether the origin is.
func (s *Server) allowOrigin(ctx *fasthttp.RequestCtx) bool {
	if len(s.cfg.CORSOrigins) == 0 {
		return false
	}
	r := &ctx.Response.Header
	all := slices.Contains(s.cfg.CORSOrigins, "*")
	origin := ctx.Request.Header.Peek(fasthttp.HeaderOrigin)
	switch {
	case len(origin) == 0:
		return false
	case all:
		r.Set(fasthttp.HeaderAccessControlAllowOrigin, "*")
	case slices.Contains(s.cfg.CORSOrigins, string(origin)):
		r.SetBytesV(fasthttp.HeaderAccessControlAllowOrigin, origin)
		r.Set(fasthttp.HeaderVary, fasthttp.HeaderOrigin)
	default:
		return false
	}
	r.Set(fasthttp.HeaderAccessControlExposeHeaders, exposed)
	return true
}

// preflight answers a browser that asks whether it may send a request to accept. It
// returns false if ctx is no such request, or its origin is not allowed.
func (s *Server) preflight(ctx *fasthttp.RequestCtx) bool {
	h := &ctx.Request.Header
	if !ctx.IsOptions() || len(h.Peek(fasthttp.HeaderAccessControlRequestMethod)) == 0 || !s.allowOrigin(ctx) {
		return false
	}
	r := &ctx.Response.Header
	r.Set(fasthttp.HeaderAccessControlAllowMethods, "GET, POST")
	r.Set(fasthttp.HeaderAccessControlAllowHeaders, "Content-Type, Content-Encoding, Idempotency-Key")
	r.Set(fasthttp.HeaderAccessControlMaxAge, preflightAge)
	r.SetCanonical(headerCache, valueNoStore)
	ctx.Response.SetStatusCode(fasthttp.StatusNoContent)
	return true
}
