package server

import (
	"bytes"

	"github.com/valyala/fasthttp"
)

// headerLines is what fasthttp does not keep of the lines of a request's headers: it drops one
// of two headers that determine the end of the request, one of two types, or of two tokens.
type headerLines struct {
	encoding bool
	types    int    // lines with Content-Type
	tokens   int    // lines with Idempotency-Key
	token    []byte // the value of the last of them, as it was sent
}

// inspect checks the headers as they were sent. They are not ok if fasthttp accepts
// in them what other readers refuse or read in another way: a line that continues
// the one before (RFC 9112, section 5.2), a space in a name, two headers for the
// end of the request (section 6.1), a Host that is none or, in HTTP/1.1,
// missing (section 3.2).
func inspect(h *fasthttp.RequestHeader) (lines headerLines, ok bool) {
	if !hostFits(h) {
		return lines, false
	}
	length := false
	for raw := h.RawHeaders(); len(raw) > 0; {
		end := bytes.IndexByte(raw, '\n')
		if end <= 1 && (end < 1 || raw[0] == '\r') {
			break // the empty line
		}
		name, value := raw[:end], []byte(nil)
		raw = raw[end+1:]
		if colon := bytes.IndexByte(name, ':'); colon > 0 {
			name, value = name[:colon], name[colon+1:]
		}
		if bytes.IndexByte(name, ' ') >= 0 || name[0] == '\t' {
			return lines, false
		}
		switch len(name) {
		case len(fasthttp.HeaderContentType):
			if bytes.EqualFold(name, contentType) {
				lines.types++
			}
		case len(fasthttp.HeaderContentLength):
			length = length || bytes.EqualFold(name, contentLength)
		case len(headerIdempotencyKey):
			if bytes.EqualFold(name, headerIdempotencyKey) {
				lines.tokens++
				lines.token = value
			}
		case len(fasthttp.HeaderTransferEncoding):
			lines.encoding = lines.encoding || bytes.EqualFold(name, transferEncoding)
		}
	}
	return lines, !length || !lines.encoding
}

// hostFits reports whether the request names a host, which HTTP/1.0 need not. fasthttp parses
// the Host itself only if the target has no host of its own.
func hostFits(h *fasthttp.RequestHeader) bool {
	host := h.Host()
	if len(host) == 0 {
		return !h.IsHTTP11()
	}
	return validHost(host) && (bytes.HasPrefix(h.RequestURI(), rootPath) || new(fasthttp.URI).Parse(host, rootPath) == nil)
}

var (
	contentType      = []byte(fasthttp.HeaderContentType)
	contentLength    = []byte(fasthttp.HeaderContentLength)
	transferEncoding = []byte(fasthttp.HeaderTransferEncoding)

	headerIdempotencyKey = []byte("Idempotency-Key")

	rootPath = []byte("/")
)

// tokenOf returns the token in the value of Idempotency-Key: the value without the space
// around it. The IETF draft for the header (draft-ietf-httpapi-idempotency-key-header)
// writes the value as a string of Structured Fields (RFC 9651, section 3.3.3). So if it begins
// with a double quote, the token is the content of that string; nil: it is no such string.
func tokenOf(value []byte) []byte {
	value = bytes.Trim(bytes.TrimSuffix(value, []byte("\r")), " \t")
	if len(value) == 0 || value[0] != '"' {
		return value
	}
	if len(value) < 2 || value[len(value)-1] != '"' {
		return nil
	}
	value = value[1 : len(value)-1]
	if bytes.IndexByte(value, '"') < 0 && bytes.IndexByte(value, '\\') < 0 {
		return value
	}
	token := make([]byte, 0, len(value))
	for i := 0; i < len(value); i++ {
		switch c := value[i]; c {
		case '"':
			return nil
		case '\\':
			if i++; i == len(value) || value[i] != '"' && value[i] != '\\' {
				return nil
			}
		}
		token = append(token, value[i])
	}
	return token
}

// hostBytes are the bytes that a host and port may have: the visible ones, without those
// that end an authority or separate its parts (RFC 3986, section 3.2).
var hostBytes = setOf("!$-+.0-;=A-[]_a-z~-")

func validHost(host []byte) bool { return len(host) > 0 && lengthOf(host, &hostBytes) == len(host) }
