package setting

import (
	"regexp"
	"strings"
)

// Prefix is how the names of variables that are settings begin.
const Prefix = "VERVE_"

// testPrefix is how the names of variables of the project's own tests begin. The tests start
// the program with their own environment, so it must ignore these.
const testPrefix = Prefix + "TEST_"

// linkURL matches the values to which Kubernetes and Docker set PORT variables. No setting has
// such a value, so a variable with such a value is theirs, even if it has the name of a
// setting.
var linkURL = regexp.MustCompile(`^(tcp|udp|sctp)://`)

// link matches a variable, with its value, that Kubernetes sets in each pod for a service named
// verve or verve-SOMETHING, or that Docker sets for a link.
var link = regexp.MustCompile(`(?s)^` + Prefix + `([^=]*_)?(` + strings.Join([]string{
	`SERVICE_HOST=[0-9a-f.:]+`,
	`SERVICE_PORT(_[A-Z0-9_]+)?=[0-9]+`,
	`PORT(_[0-9]+_(TCP|UDP|SCTP)(_START|_END)?)?=(tcp|udp|sctp)://.*`,
	`PORT_[0-9]+_(TCP|UDP|SCTP)_(PROTO=(tcp|udp|sctp)|PORT(_START|_END)?=[0-9]+|ADDR=[0-9a-f.:]+)`,
	`NAME=/.*`,     // Docker sets it to /CONTAINER/ALIAS
	`ENV_[^=]+=.*`, // Docker copies the variables of the other container
}, "|") + `)$`)

// variables returns the variables in environ that may be settings: they have the prefix, are
// not empty, and are not set by another program. known has the variables that are settings.
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
