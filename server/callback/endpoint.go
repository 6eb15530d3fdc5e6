package callback

import (
	"bytes"
	"errors"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// maxEndpoint is the longest endpoint URL that is accepted, in bytes. Browsers and
// proxies accept that length, and it bounds the memory of a waiting POST.
const maxEndpoint = 2048

// errEndpoint refuses an endpoint URL. It does not name the rule that the URL breaks, as the
// answer to the request does not either.
var errEndpoint = errors.New("the endpoint is malformed, or not allowed by its URL")

// destKind is the rule by which a destination is allowed. It decides which addresses the
// destination may have and whether it is rate-limited.
type destKind uint8

const (
	destPublic destKind = iota // default policy; addresses in an allow-listed CIDR:PORT too
	destListed                 // named by an allow-list entry
	destSelf                   // this server's own /test
)

// Endpoint is a callback URL that passed the check of its text. A request is made
// from its parts alone: the URL as it was given is not read again.
//
// The zero Endpoint is not a valid argument to any method of Sender.
type Endpoint struct {
	url    string // canonical, port always present: POSTs with the same url merge
	origin string // url up to the target: scheme://host:port
	host   string // canonical host, no brackets
	target string // path and query as given, not decoded, not normalised
	addr   netip.Addr
	port   uint16
	kind   destKind
	tls    bool
}

// logURL is the endpoint as it may be written to a log: no query, which is
// where callers keep tokens, and not the whole of an overlong path. A user
// part cannot occur: such URLs are refused.
func (ep Endpoint) logURL() string {
	path, _, _ := strings.Cut(ep.target, "?")
	return ep.origin + shortened(path)
}

// shortened bounds a text in a line of the log that callers or receivers choose.
func shortened(text string) string {
	const longest = 200
	if len(text) > longest {
		text = text[:longest] + "..."
	}
	return text
}

// Parse checks raw, the percent-decoded value of the endpoint parameter, and splits it
// into its parts. It does not keep raw. It asks no resolver: the addresses of a name are
// checked at the dial. It is stricter than the URL grammar, so that no reader of the same
// bytes (fasthttp, net/url, a proxy, a log viewer) sees another host in them. Its error
// does not name the rule that the URL breaks.
func (s *Sender) Parse(raw []byte) (Endpoint, error) {
	g := s.guard
	var ep Endpoint
	authority, target, ok := ep.splitURL(raw)
	if !ok {
		return Endpoint{}, errEndpoint
	}
	host, port, ok := splitAuthority(authority, ep.tls)
	if !ok {
		return Endpoint{}, errEndpoint
	}
	ep.port = port
	if ep.host, ep.addr, ok = canonicalHost(host); !ok {
		return Endpoint{}, errEndpoint
	}
	path, _, _ := bytes.Cut(target, []byte("?"))
	if ep.tls == (g.selfTLS != nil) && string(path) == g.selfPath && g.isSelf(ep.host, ep.addr, port) {
		// All names of this server are one destination.
		ep.kind, ep.host, ep.addr = destSelf, "localhost", netip.Addr{}
	} else if !g.classify(&ep) {
		return Endpoint{}, errEndpoint
	}
	ep.assemble(target)
	if _, err := url.PathUnescape(ep.target); err != nil {
		return Endpoint{}, errEndpoint
	}
	return ep, nil
}

// splitURL checks the bytes and the scheme, and returns the rest of the URL in two
// parts.
func (ep *Endpoint) splitURL(raw []byte) (authority, target []byte, ok bool) {
	if len(raw) > maxEndpoint {
		return nil, nil, false
	}
	for _, b := range raw {
		// About '#' and '\' readers of URLs differ most. RFC 3986 allows quotes and
		// angle brackets only percent-encoded, because they delimit URLs in text.
		if b <= ' ' || b >= 0x7f || b == '#' || b == '\\' || b == '"' || b == '<' || b == '>' || b == '`' {
			return nil, nil, false
		}
	}
	rest, ok := cutPrefixFold(raw, "http://")
	if !ok {
		if rest, ok = cutPrefixFold(raw, "https://"); !ok {
			return nil, nil, false
		}
		ep.tls = true
	}
	authority = rest
	if i := bytes.IndexAny(rest, "/?"); i >= 0 {
		authority, target = rest[:i], rest[i:]
	}
	return authority, target, true
}

// canonicalHost returns the host in its one spelling, without brackets, and the address if it
// is one.
func canonicalHost(host []byte) (name string, addr netip.Addr, ok bool) {
	if inner, ok := bytes.CutPrefix(host, []byte("[")); ok {
		inner, ok = bytes.CutSuffix(inner, []byte("]"))
		// A v4 address written as v6 is another spelling of the address.
		addr, err := netip.ParseAddr(string(inner))
		if !ok || err != nil || !addr.Is6() || addr.Is4In6() || addr.Zone() != "" {
			return "", netip.Addr{}, false
		}
		return addr.String(), addr, true
	}
	if name, ok = canonicalName(host); !ok || !endsInNumber(name) {
		return name, netip.Addr{}, ok
	}
	// host is parsed, not name: with a dot at the end it is another spelling, too.
	addr, err := netip.ParseAddr(string(host))
	return name, addr, err == nil && addr.Is4()
}

// classify sets the kind of an endpoint on another server than this one, and reports whether it
// may be called.
func (g *guard) classify(ep *Endpoint) bool {
	switch {
	case g.hosts[hostPort{ep.host, ep.port}]:
		ep.kind = destListed
	case ep.addr.IsValid() && g.inAllowedNet(ep.addr, ep.port):
		ep.kind = destListed
	case !ep.addr.IsValid() && g.allowedNetPort(ep.port):
		// A CIDR:PORT entry has the port. Its addresses may have any name, also an
		// internal one: the dial decides.
	case !defaultPort(ep.port):
		return false
	case ep.addr.IsValid():
		return g.base.SafeAddr(ep.addr) == nil
	default:
		return isPublicName(ep.host)
	}
	return true
}

// assemble builds the canonical URL; the origin and the target are parts of it.
func (ep *Endpoint) assemble(target []byte) {
	scheme, host := "http://", ep.host
	if ep.tls {
		scheme = "https://"
	}
	if ep.addr.Is6() {
		host = "[" + host + "]"
	}
	text := make([]byte, 0, len("https://:65535/")+len(host)+len(target))
	text = append(append(append(text, scheme...), host...), ':')
	text = strconv.AppendUint(text, uint64(ep.port), 10)
	origin := len(text)
	if len(target) == 0 || target[0] != '/' {
		text = append(text, '/')
	}
	ep.url = string(append(text, target...))
	ep.origin, ep.target = ep.url[:origin], ep.url[origin:]
}

// cutPrefixFold is bytes.CutPrefix for an ASCII prefix in upper or lower case.
func cutPrefixFold(b []byte, prefix string) ([]byte, bool) {
	if len(b) < len(prefix) || !bytes.EqualFold(b[:len(prefix)], []byte(prefix)) {
		return nil, false
	}
	return b[len(prefix):], true
}

// splitAuthority splits an authority into host and port; the host keeps its brackets.
// A user part is refused, because neither host nor port can contain one.
func splitAuthority(authority []byte, tls bool) (host []byte, port uint16, ok bool) {
	port = 80
	if tls {
		port = 443
	}
	end := bytes.IndexByte(authority, ':')
	if len(authority) > 0 && authority[0] == '[' {
		end = bytes.IndexByte(authority, ']') + 1
	}
	host = authority
	if end >= 0 && end < len(authority) {
		host = authority[:end]
		port, ok = parsePort(string(authority[end+1:]))
		if !ok || authority[end] != ':' {
			return nil, 0, false
		}
	}
	return host, port, len(host) > 0
}

// parsePort accepts only one spelling of a port: another one would make a second
// queue for the same destination, or could wrap around in a smaller integer.
func parsePort(digits string) (uint16, bool) {
	n, err := strconv.ParseUint(digits, 10, 16)
	return uint16(n), err == nil && digits[0] != '0'
}

// canonicalName returns the canonical form of host (lower case, no root dot), if its labels
// are of letters, digits, hyphens and underscores as names of hosts are.
func canonicalName(host []byte) (name string, ok bool) {
	host = bytes.TrimSuffix(host, []byte("."))
	if len(host) > 253 {
		return "", false
	}
	for label := range bytes.SplitSeq(host, []byte(".")) {
		n := len(label)
		if n == 0 || n > 63 || label[0] == '-' || label[n-1] == '-' || bytes.ContainsFunc(label, notInName) {
			return "", false
		}
	}
	return strings.ToLower(string(host)), true
}

func notInName(r rune) bool {
	letter := r | 0x20 // in lower case
	return r != '-' && r != '_' && (r < '0' || r > '9') && (letter < 'a' || letter > 'z')
}

// endsInNumber reports whether the last label of name is a number. Some resolver would
// take such a name for an IPv4 address in one of its many old spellings (the rule is
// that of the WHATWG URL standard).
func endsInNumber(name string) bool {
	last := name[strings.LastIndexByte(name, '.')+1:]
	digits := "0123456789"
	if hex, ok := strings.CutPrefix(last, "0x"); ok {
		last, digits = hex, "0123456789abcdef"
	}
	return len(strings.TrimLeft(last, digits)) == 0
}

// internalSuffixes are the last labels of names that the public DNS does not have:
// reserved by RFC 2606, 6761, 6762, 7686, 8375 and 9476, by ICANN for private use, or
// in common use inside networks. The dial would refuse most of their addresses. To
// refuse the text informs the caller, and asks no resolver about them.
var internalSuffixes = map[string]bool{
	"localhost": true, "localdomain": true, "local": true, "internal": true,
	"intranet": true, "private": true, "corp": true, "home": true, "lan": true,
	"svc": true, "arpa": true, "test": true, "example": true, "invalid": true,
	"onion": true, "alt": true,
}

// isPublicName reports whether name can be that of a public host. Names that container
// engines give have underscores: they may be in the allow-list, but are not public.
func isPublicName(name string) bool {
	dot := strings.LastIndexByte(name, '.')
	return dot >= 0 && !internalSuffixes[name[dot+1:]] && !strings.Contains(name, "_")
}
