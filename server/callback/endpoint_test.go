package callback

import (
	"bufio"
	"bytes"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/valyala/fasthttp"
)

// endpointPolicy returns Sender that parse but never run.
func endpointPolicy(t testing.TB, self string, allow ...string) *Sender {
	t.Helper()
	cfg := Config{Allow: allow, SelfPath: sinkPath, Live: func() (time.Time, uint64) { return time.Time{}, 0 }}
	if self != "" {
		cfg.SelfAddr = netip.MustParseAddrPort(self)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// ssrfCase is a row of testdata/ssrf_cases.tsv.
type ssrfCase struct{ url, verdict, why string }

// ssrfCases reads the rows. Those whose URL the file shortens at its end are
// filled up to their length by what they end in.
func ssrfCases(t testing.TB) (rows []ssrfCase) {
	t.Helper()
	file, err := os.ReadFile("testdata/ssrf_cases.tsv")
	if err != nil {
		t.Fatal(err)
	}
	unquote := strings.NewReplacer(`\t`, "\t", `\x00`, "\x00")
	shortened := regexp.MustCompile(`^(.*)…\((\d+) bytes\)$`)
	for line := range strings.Lines(string(file)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), "\t", 3)
		if f[0] == "url" {
			continue
		}
		u := unquote.Replace(f[0])
		if m := shortened.FindStringSubmatch(u); m != nil {
			size, err := strconv.Atoi(m[2])
			if err != nil {
				t.Fatal(err)
			}
			filler := "a"
			if strings.Contains(u, "abcdefg.") {
				filler = "fg.abcde"
			}
			u = m[1]
			for len(u) < size {
				u += filler
			}
			u = u[:size]
		}
		rows = append(rows, ssrfCase{u, f[1], f[2]})
	}
	return rows
}

func TestEndpointVerdictOfEveryCase(t *testing.T) {
	c := endpointPolicy(t, "")
	rows := ssrfCases(t)
	if len(rows) < 86 {
		t.Fatalf("%d rows", len(rows))
	}
	// Allowed by their text; what bounds them has tests of its own.
	bounded := map[string]func(*testing.T){
		"self":       TestEndpointOwnSinkIsTheOnlyOwnPath,
		"victim":     TestCallbackFloodForOneVictimIsMergedAndSlow,
		"tarpit":     TestCallbackTarpitHoldsUpNobodyElse,
		"bomb":       TestCallbackHostileAnswersAreBounded,
		"endless1xx": TestCallbackHostileAnswersAreBounded,
	}
	for _, row := range rows {
		_, err := c.Parse([]byte(row.url))
		switch row.verdict {
		case "allow":
			if err != nil {
				t.Errorf("%q refused (%v), want allowed: %s", row.url, err, row.why)
			}
		case "refuse (url)":
			if err == nil {
				t.Errorf("%q allowed, want refused: %s", row.url, row.why)
			}
		case "refuse (policy)", "refuse (loop)":
			name, _, _ := strings.Cut(strings.TrimPrefix(row.url, "http://"), ".")
			test := bounded[name]
			if err != nil || test == nil {
				t.Errorf("%q: %v, want allowed by its text, and a test of what bounds it", row.url, err)
				continue
			}
			t.Run(name, test)
		default:
			t.Errorf("%q: verdict %q", row.url, row.verdict)
		}
	}
}

// More of the classes in the file, and those too long for it.
func TestEndpointVerdictsOfTheSameClasses(t *testing.T) {
	c := endpointPolicy(t, "")
	label63 := strings.Repeat("a", 63)
	host253 := strings.Join([]string{label63, label63, label63, strings.Repeat("a", 57), "com"}, ".")
	for _, u := range []string{
		"http://hooks.example.com",
		"http://hooks.example.com?x=1",
		"http://hooks.example.com/?u=http://10.0.0.1/",
		"http://hooks.example.com//10.0.0.1/",
		"http://hooks.example.com/@10.0.0.1/",
		"http://hooks.example.com/a:b@c?d@e:80",
		"http://hooks.example.com/?a[]=1&b={x}|y^z",
		"http://hooks.example.com/../../etc",
		"http://hooks.example.com/%00%2e%2E",
		"https://hooks.example.com:8443/",
		"https://hooks.example.com:80/",
		"http://8.8.8.8/",
		"http://172.15.255.255/",
		"http://100.63.255.255/",
		"http://100.128.0.1/",
		"http://192.167.255.255/",
		"http://198.17.255.255/",
		"http://223.255.255.255/",
		"http://[2606:4700::1111]/",
		"http://[2606:4700:0:0::1111]:8080/",
		"http://0x7f.example.com/",
		"http://127.0.0.1.example.com/",
		"http://localhost.example.com/",
		"http://a.b-c.1d.co/",
		"http://" + host253 + "/",
		"http://" + host253 + "./",
		"http://hooks.example.com/" + strings.Repeat("a", maxEndpoint-len("http://hooks.example.com/")),
	} {
		if _, err := c.Parse([]byte(u)); err != nil {
			t.Errorf("%q refused (%v), want allowed", u, err)
		}
	}
	for _, u := range []string{
		"", "h", "http", "http:", "http:/", "http://", "https://", "http://?", "http://:80/", "http://./", "http://..",
		"//hooks.example.com/", "hooks.example.com", "http:hooks.example.com", "http:\\\\hooks.example.com",
		"http:///hooks.example.com/", "javascript:alert(1)", "file:///etc/passwd", "gopher://hooks.example.com/",
		"http://http://hooks.example.com/", "view-source:http://hooks.example.com/",
		"http://hooks.example.com\\@10.0.0.1/", "http://10.0.0.1\\.hooks.example.com/",
		"http://@hooks.example.com/", "http://:@hooks.example.com/", "http://user@hooks.example.com/",
		"http://hooks.example.com/#", "http://hooks.example.com#/", "http://hooks.example.com/a#b",
		"http://hooks.example.com/ä", "http://hooks.example.com/\x7f", "http://hooks.example.com/\xff",
		"http://hooks.example.com/a b", "http://hooks.example.com\r\nHost: x/", "\nhttp://hooks.example.com/",
		"http://hooks.example.com/%", "http://hooks.example.com/%4", "http://hooks.example.com/%zz", "http://hooks.example.com/?%g0",
		"http://hooks.example.com/<x>", "http://hooks.example.com/\"", "http://hooks.example.com/`",
		"http://hooks%00.example.com/", "http://hooks.example.com%3a80/", "http://hooks.example.com%2f/",
		"http://hooks.example.com../", "http://.hooks.example.com/", "http://hooks.example-.com/", "http://hooks.example.com-/",
		"http://hooks_x.example.com/", "http://hooks.exa*mple.com/", "http://hooks.example.com,evil.com/", "http://hooks.example.com;80/",
		"http://" + label63 + "a.example.com/", "http://a" + host253 + "/",
		"http://hooks.example.com/" + strings.Repeat("a", maxEndpoint),
		"http://hooks.example.com:0/", "http://hooks.example.com:+80/", "http://hooks.example.com:80 /", "http://hooks.example.com:0x50/",
		"http://hooks.example.com:80x/", "http://hooks.example.com:000080/", "http://hooks.example.com:4294967376/",
		"http://hooks.example.com:81/", "http://hooks.example.com:8081/", "http://8.8.8.8:9000/",
		"http://localhost:8080/test", "http://localhost./", "http://foo.localhost/", "http://localhost.localdomain/", "http://printer.local/",
		"http://db.internal./", "http://x.svc.cluster.local/", "http://nas.home.arpa/", "http://1.0.0.127.in-addr.arpa/", "http://x.onion/",
		"http://0x/", "http://0x7f.0.0.1/", "http://1/", "http://1.1/", "http://017700000001/", "http://127.0.0.0x1/",
		"http://8.8.8.8./", "http://08.8.8.8/", "http://8.8.8/", "http://8.8.8.8.8/", "http://8.8.8.256/", "http://hooks.example.123/", "http://hooks.example.0x1f/",
		"http://127.255.255.254/", "http://100.64.0.1/", "http://100.127.255.255/", "http://100.100.100.200/", "http://192.0.2.1/", "http://198.51.100.1/",
		"http://198.19.255.255/", "http://192.88.99.1/", "http://224.0.0.1/", "http://240.0.0.1/", "http://0.1.2.3/", "http://172.20.1.1/",
		"http://[::]/", "http://[::ffff:8.8.8.8]/", "http://[::ffff:127.0.0.1]/", "http://[0:0:0:0:0:0:0:1]/", "http://[::1%25lo]/", "http://[fe80::1%25eth0]/",
		"http://[fe80::1]/", "http://[ff02::1]/", "http://[fd00:ec2::254]/", "http://[2002:7f00:1::]/", "http://[2001:10::1]/", "http://[3fff::1]/",
		"http://[64:ff9b::8.8.8.8]/", "http://[4000::1]/", "http://[::8.8.8.8]/",
		"http://[2606:4700::1111/", "http://2606:4700::1111/", "http://[2606:4700::1111]x/", "http://[2606:4700::1111]:/", "http://[2606:4700::1111]:80:80/",
		"http://[]/", "http://[hooks.example.com]/", "http://[8.8.8.8]/", "http://[[2606:4700::1111]]/", "http://x[2606:4700::1111]/", "http://[2606:4700::1111]:22/",
	} {
		if ep, err := c.Parse([]byte(u)); err == nil {
			t.Errorf("%q allowed as %q, want refused", u, ep.url)
		}
	}
}

func TestEndpointSpellingsOfOneURLAreOneKey(t *testing.T) {
	c := endpointPolicy(t, "127.0.0.2:8080", "[FD00:0::1]:9000")
	for _, tc := range []struct{ raw, url, origin string }{
		{"HTTP://Hooks.Example.COM/", "http://hooks.example.com:80/", "http://hooks.example.com:80"},
		{"http://hooks.example.com./", "http://hooks.example.com:80/", "http://hooks.example.com:80"},
		{"http://hooks.example.com:80", "http://hooks.example.com:80/", "http://hooks.example.com:80"},
		{"http://hooks.example.com?A=b", "http://hooks.example.com:80/?A=b", "http://hooks.example.com:80"},
		{"https://hooks.example.com", "https://hooks.example.com:443/", "https://hooks.example.com:443"},
		{"http://hooks.example.com/A/../%0d%0aX?", "http://hooks.example.com:80/A/../%0d%0aX?", "http://hooks.example.com:80"},
		{"http://[2606:4700:0::1111]/x", "http://[2606:4700::1111]:80/x", "http://[2606:4700::1111]:80"},
		{"http://[FD00::0:1]:9000/x", "http://[fd00::1]:9000/x", "http://[fd00::1]:9000"},
		{"http://127.0.0.1:8080/test", "http://localhost:8080/test", "http://localhost:8080"},
		{"http://[::1]:8080/test?n=1", "http://localhost:8080/test?n=1", "http://localhost:8080"},
		{"http://127.0.0.2:8080/test", "http://localhost:8080/test", "http://localhost:8080"},
		{"http://LOCALHOST.:8080/test", "http://localhost:8080/test", "http://localhost:8080"},
	} {
		ep, err := c.Parse([]byte(tc.raw))
		if err != nil || ep.url != tc.url || ep.origin != tc.origin || ep.origin+ep.target != ep.url {
			t.Errorf("Parse(%q) = %q, origin %q, target %q, %v; want %q, %q", tc.raw, ep.url, ep.origin, ep.target, err, tc.url, tc.origin)
		}
	}
}

func TestEndpointOwnSinkIsTheOnlyOwnPath(t *testing.T) {
	loopback, all := endpointPolicy(t, "127.0.0.1:8080"), endpointPolicy(t, "[::]:80")
	for _, tc := range []struct {
		url   string
		allow bool
	}{
		{"http://localhost:8080/test", true},
		{"http://localhost/test", true},
		{"http://verve.lan/test", false}, // a name may lead anywhere
		{"http://[::1]/test", true},
		{"http://localhost:8443/test", false},
		{"https://localhost:8080/test", false},
		{"http://localhost:8080/", false},
		{"http://localhost:8080/test/", false},
		{"http://localhost:8080//test", false},
		{"http://localhost:8080/x/../test", false},
		{"http://localhost:8080/%74est", false},
		{"http://localhost:8080/api/verve/accept?id=1", false},
		{"http://127.0.0.3:8080/test", false},
		{"http://[::1]:8080/test", true},
	} {
		c := all
		if strings.Contains(tc.url, ":8") {
			c = loopback
		}
		ep, err := c.Parse([]byte(tc.url))
		if (err == nil) != tc.allow {
			t.Errorf("%s: %v, want allowed %v", tc.url, err, tc.allow)
		}
		if tc.allow && ep.kind != destSelf {
			t.Errorf("%s: kind %d", tc.url, ep.kind)
		}
	}
}

func TestEndpointAllowListLiftsWhatItNames(t *testing.T) {
	c := endpointPolicy(t, "", "Hooks.Lan:9000", "worker_1:9001", "127.0.0.1:9002", "[::1]:9003", "10.0.0.0/8:9004", "[fd00::/8]:9005", "fd11::/16:9006", "[fd00::]/8:9007")
	for _, tc := range []struct {
		url   string
		allow bool
	}{
		{"http://hooks.lan:9000/", true},
		{"https://HOOKS.lan.:9000/x", true},
		{"http://hooks.lan/", false},
		{"http://other.lan:9000/", false},
		{"http://x.hooks.lan:9000/", false},
		{"http://worker_1:9001/", true},
		{"http://127.0.0.1:9002/", true},
		{"http://127.1:9002/", false},
		{"http://localhost:9002/", false},
		{"http://127.0.0.2:9002/", false},
		{"http://[::1]:9003/", true},
		{"http://[0::1]:9003/", true},
		{"http://10.1.2.3:9004/", true},
		{"http://11.1.2.3:9004/", false},
		{"http://010.1.2.3:9004/", false},
		{"http://10.1.2.3/", false},
		{"http://worker:9004/", true}, // its addresses are judged at the dial
		{"http://worker:80/", false},
		{"http://[fd12::1]:9005/", true},
		{"http://[fc12::1]:9005/", false},
		{"http://[fd11::1]:9006/", true},
		{"http://[fd11::1]:9007/", true},
	} {
		if _, err := c.Parse([]byte(tc.url)); (err == nil) != tc.allow {
			t.Errorf("%s: %v, want allowed %v", tc.url, err, tc.allow)
		}
	}
	for _, entry := range []string{
		"", "hooks.lan", ":9000", "hooks.lan:", "hooks.lan:0", "hooks.lan:080", "hooks.lan:65536", "hooks.lan:http", "http://hooks.lan:80",
		"10.0.0.0/8", "10.0.0.1/8:80", "10.0.0.0/33:80", "10.0.0/8:80", "::ffff:10.0.0.0/104:80", "fd00::1:80", "[fd00::1:80", "[10.0.0.1]:80",
		"127.1:80", "256.1.1.1:80", "a..b:80", "user@hooks.lan:80", "*.lan:80",
	} {
		_, err := New(Config{Allow: []string{entry}, Live: func() (time.Time, uint64) { return time.Time{}, 0 }})
		if err == nil || !strings.Contains(err.Error(), "callback-allow") {
			t.Errorf("entry %q: error %v, want one that names the setting", entry, err)
		}
	}
}

// requestBytes is what goes out for ep.
func requestBytes(t testing.TB, ep Endpoint) []byte {
	t.Helper()
	c := endpointPolicy(t, "")
	d := c.newDestination(ep)
	var req fasthttp.Request
	setRequest(&req, d, ep)
	req.URI().DisablePathNormalizing = true // as the client does
	var out bytes.Buffer
	bw := bufio.NewWriter(&out)
	if err := req.Write(bw); err != nil {
		t.Fatal(err)
	}
	_ = bw.Flush()
	return out.Bytes()
}

// Whoever reads an allowed URL (ours, fasthttp's reader, net/url) sees the
// same host and port, and the request says the same again.
func FuzzEndpointReadersAgree(f *testing.F) {
	for _, row := range ssrfCases(f) {
		f.Add([]byte(row.url))
	}
	for _, u := range []string{
		"http://hooks.lan:9000/x?y", "http://10.1.2.3:9004/", "http://[fd12::1]:9005", "http://localhost:8080/test?x",
		"https://hooks.example.com?://10.0.0.1/", "http://hooks.example.com//x://y@z/", "http://hooks.example.com:8443?",
	} {
		f.Add([]byte(u))
	}
	c := endpointPolicy(f, "[::]:8080", "hooks.lan:9000", "10.0.0.0/8:9004", "[fd00::/8]:9005", "0.0.0.0/0:9006")
	f.Fuzz(func(t *testing.T, raw []byte) {
		ep, err := c.Parse(raw)
		if err != nil {
			return
		}
		scheme, defaultPort := "http", "80"
		if ep.tls {
			scheme, defaultPort = "https", "443"
		}
		same := func(reader, gotScheme, host, port string) {
			t.Helper()
			if port == "" {
				port = defaultPort
			}
			host = strings.TrimSuffix(strings.ToLower(host), ".")
			if addr, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
				host = addr.String()
			}
			if ep.kind == destSelf && (host == "127.0.0.1" || host == "::1") {
				host = "localhost"
			}
			if gotScheme != scheme || host != ep.host || port != strconv.Itoa(int(ep.port)) {
				t.Fatalf("%s reads %q as %s, %s, %s; we %s, %s, %d", reader, raw, gotScheme, host, port, scheme, ep.host, ep.port)
			}
		}

		u, err := url.Parse(string(raw))
		if err != nil {
			t.Fatalf("net/url refuses %q: %v", raw, err)
		}
		if u.User != nil || u.Fragment != "" || u.Opaque != "" {
			t.Fatalf("net/url sees more in %q: %+v", raw, u)
		}
		same("net/url", u.Scheme, u.Hostname(), u.Port())

		var fu fasthttp.URI
		if err := fu.Parse(nil, raw); err != nil {
			t.Fatalf("fasthttp refuses %q: %v", raw, err)
		}
		if len(fu.Username())+len(fu.Password())+len(fu.Hash()) > 0 {
			t.Fatalf("fasthttp sees more in %q", raw)
		}
		host, port := string(fu.Host()), ""
		if i := strings.LastIndexByte(host, ':'); i >= 0 && host[len(host)-1] != ']' {
			host, port = host[:i], host[i+1:]
		}
		same("fasthttp", string(fu.Scheme()), host, port)

		again, err := c.Parse([]byte(ep.url))
		if err != nil || again != ep {
			t.Fatalf("canonical %q of %q is read as %+v, %v; want %+v", ep.url, raw, again, err, ep)
		}

		wire := requestBytes(t, ep)
		line, _, _ := bytes.Cut(wire, []byte("\r\n"))
		if want := "POST " + ep.target + " HTTP/1.1"; string(line) != want {
			t.Fatalf("request line %q, want %q", line, want)
		}
		req, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(wire)))
		if err != nil {
			t.Fatalf("net/http refuses the request for %q: %v", raw, err)
		}
		h, p, err := net.SplitHostPort(req.Host)
		if err != nil {
			h, p = req.Host, ""
		}
		same("the request", scheme, h, p)
	})
}
