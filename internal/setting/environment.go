package setting

import (
	"regexp"
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

// link is a variable, with its value, that Kubernetes makes in each pod for a service named
// verve or verve-SOMETHING, or that Docker makes for a link.
var link = regexp.MustCompile(`(?s)^` + Prefix + `([^=]*_)?(` + strings.Join([]string{
	`SERVICE_HOST=[0-9a-f.:]+`,
	`SERVICE_PORT(_[A-Z0-9_]+)?=[0-9]+`,
	`PORT(_[0-9]+_(TCP|UDP|SCTP)(_START|_END)?)?=(tcp|udp|sctp)://.*`,
	`PORT_[0-9]+_(TCP|UDP|SCTP)_(PROTO=(tcp|udp|sctp)|PORT(_START|_END)?=[0-9]+|ADDR=[0-9a-f.:]+)`,
	`NAME=/.*`,     // Docker: /CONTAINER/ALIAS
	`ENV_[^=]+=.*`, // Docker: the other container's variables
}, "|") + `)$`)

// variables returns those of environ that may be settings: with the prefix, not
// empty, and not another program's.
func variables(environ []string, known map[string]bool) map[string]string {
	found := make(map[string]string)
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		switch {
		case !strings.HasPrefix(name, Prefix), value == "", strings.HasPrefix(name, testPrefix):
		case known[name] && linkURL.MatchString(value), !known[name] && link.MatchString(e):
		default:
			found[name] = value
		}
	}
	return found
}
