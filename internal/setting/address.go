package setting

import (
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

var (
	hostName = regexp.MustCompile(`^([A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?$`)
	numeric  = regexp.MustCompile(`(^|\.)[0-9]+$`) // resolvers treat such a text as an address
)

// BadAddress returns why the address cannot be HOST:PORT of a server; "" if it can. The port
// may be missing if defaultPort is not empty.
func BadAddress(address, defaultPort string) string {
	host, port := address, defaultPort
	if colon := strings.LastIndexByte(address, ':'); colon > strings.LastIndexByte(address, ']') {
		host, port = address[:colon], address[colon+1:]
	} else if port == "" {
		return "want HOST:PORT, the port is missing"
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || port[0] == '+' {
		return "want a port from 1 to 65535 after the colon"
	}
	if !isHost(host) {
		return "want a host before the colon: a name, an IPv4 address, or an IPv6 address in brackets"
	}
	return ""
}

// isHost reports whether host is a possible host name, an IPv4 address, or an IPv6 address in
// brackets.
func isHost(host string) bool {
	if inner, ok := strings.CutPrefix(host, "["); ok {
		inner, closed := strings.CutSuffix(inner, "]")
		addr, err := netip.ParseAddr(inner)
		return closed && err == nil && addr.Is6()
	}
	if numeric.MatchString(host) {
		addr, err := netip.ParseAddr(host)
		return err == nil && addr.Is4()
	}
	return len(host) <= 253 && hostName.MatchString(host)
}
