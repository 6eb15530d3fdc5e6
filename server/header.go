package server

import (
	"bytes"

	"github.com/valyala/fasthttp"
)

// headerLines is what the lines of a request's headers say that fasthttp does not
// keep: it drops one of two headers that say where a request ends.
type headerLines struct{ encoding bool }

// inspect looks at the headers as they were sent. They are not ok where fasthttp
// takes what other readers refuse or read in another way: a line that continues
// the one before (RFC 9112, section 5.2), a space in a name, two headers that say
// where the request ends (section 6.1), a Host that is none or, in HTTP/1.1,
// missing (section 3.2).
func inspect(h *fasthttp.RequestHeader) (lines headerLines, ok bool) {
	if host := h.Host(); len(host) == 0 && h.IsHTTP11() || len(host) > 0 && !validHost(host) {
		return lines, false
	}
	length := false
	for raw := h.RawHeaders(); len(raw) > 0; {
		end := bytes.IndexByte(raw, '\n')
		if end <= 1 && (end < 1 || raw[0] == '\r') {
			break // the empty line
		}
		name := raw[:end]
		raw = raw[end+1:]
		if colon := bytes.IndexByte(name, ':'); colon > 0 {
			name = name[:colon]
		}
		if bytes.IndexByte(name, ' ') >= 0 || name[0] == '\t' {
			return lines, false
		}
		switch len(name) {
		case len(fasthttp.HeaderContentLength):
			length = length || bytes.EqualFold(name, contentLength)
		case len(fasthttp.HeaderTransferEncoding):
			lines.encoding = lines.encoding || bytes.EqualFold(name, transferEncoding)
		}
	}
	return lines, !length || !lines.encoding
}

var (
	contentLength    = []byte(fasthttp.HeaderContentLength)
	transferEncoding = []byte(fasthttp.HeaderTransferEncoding)
)

// hostBytes marks what a host and port may hold: what is visible, without the
// bytes that end an authority or separate its parts (RFC 3986, section 3.2).
var hostBytes = func() (t [256]bool) {
	for c := '!'; c <= '~'; c++ {
		t[c] = true
	}
	for _, c := range []byte("\"#,/<>?@\\^`{|}") {
		t[c] = false
	}
	return t
}()

func validHost(host []byte) bool {
	for _, c := range host {
		if !hostBytes[c] {
			return false
		}
	}
	return len(host) > 0
}
