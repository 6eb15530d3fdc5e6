package setting

import (
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// Prefix is that of the variables that are settings.
const Prefix = "VERVE_"

// testPrefix is that of the variables of the project's own tests, which start
// the program with their environment.
const testPrefix = Prefix + "TEST_"

// linkURL is what Kubernetes and Docker set PORT variables to. No setting has
// such a value, so a variable with one is theirs even if a flag has its name.
var linkURL = regexp.MustCompile(`^(tcp|udp|sctp)://`)

// links are the variables that Kubernetes makes in each pod for a service named
// verve or verve-SOMETHING, and that Docker makes for a link: by the end of the
// name, and the value.
var links = []struct {
	name  *regexp.Regexp
	value func(string) bool
}{
	{regexp.MustCompile(`_SERVICE_HOST$`), isAddress},
	{regexp.MustCompile(`_SERVICE_PORT(_[A-Z0-9_]+)?$`), isPort},
	{regexp.MustCompile(`_PORT(_[0-9]+_(TCP|UDP|SCTP)(_START|_END)?)?$`), linkURL.MatchString},
	{regexp.MustCompile(`_PORT_[0-9]+_(TCP|UDP|SCTP)_PROTO$`), regexp.MustCompile(`^(tcp|udp|sctp)$`).MatchString},
	{regexp.MustCompile(`_PORT_[0-9]+_(TCP|UDP|SCTP)_PORT(_START|_END)?$`), isPort},
	{regexp.MustCompile(`_PORT_[0-9]+_(TCP|UDP|SCTP)_ADDR$`), isAddress},
	{regexp.MustCompile(`_NAME$`), func(v string) bool { return strings.HasPrefix(v, "/") }}, // Docker: /CONTAINER/ALIAS
	{regexp.MustCompile(`_ENV_.`), func(string) bool { return true }},                        // Docker: the other container's variables
}

func isAddress(v string) bool {
	_, err := netip.ParseAddr(v)
	return err == nil
}

func isPort(v string) bool {
	n, err := strconv.ParseUint(v, 10, 16)
	return err == nil && n > 0
}

// isLink reports whether a variable that is no setting was made by Kubernetes or
// Docker.
func isLink(name, value string) bool {
	for _, l := range links {
		if l.name.MatchString(name) && l.value(value) {
			return true
		}
	}
	return false
}

// variables returns those of environ that may be settings: with the prefix, not
// empty, and not another program's.
func variables(environ []string, known map[string]bool) map[string]string {
	found := make(map[string]string)
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		switch {
		case !strings.HasPrefix(name, Prefix), value == "", strings.HasPrefix(name, testPrefix):
		case known[name] && linkURL.MatchString(value), !known[name] && isLink(name, value):
		default:
			found[name] = value
		}
	}
	return found
}
