package system_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"verve/internal/testproc"

	"github.com/goccy/go-yaml"
)

// TestPrintedConfigIsTheOneInForce: what --print-config says is a --config file
// with the same effect, each value with its source, and it starts nothing.
func TestPrintedConfigIsTheOneInForce(t *testing.T) {
	t.Parallel()
	const odd = "a\tb\nc: <\u0085> # d"
	dir := t.TempDir()
	file := filepath.Join(dir, "settings.yaml")
	if err := os.WriteFile(file, []byte("group: from-file\nwindow: 3s\nid-format: uint64\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := testproc.Verve(t, "--print-config", "--config="+file, "--window=2s", "--callback-allow=a.lan:1", "--callback-allow=10.0.0.0/8:9", "--instance=?", "--counts-file="+odd)
	cmd.Env = append(cmd.Env, "VERVE_ID_FORMAT=opaque", "VERVE_CALLBACK_RATE=12.5")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{
		`group: "from-file" +# ` + regexp.QuoteMeta(file), `window: "2s" +# --window`, `id-format: "opaque" +# VERVE_ID_FORMAT`,
		`callback-rate: 12.5 +# VERVE_CALLBACK_RATE`, `listen: ":8080" +# default`, `callback-allow: \["a.lan:1","10.0.0.0/8:9"\] +# --callback-allow`, `instance: "\?" +# --instance`,
	} {
		if !regexp.MustCompile(`(?m)^` + want + `$`).Match(out) {
			t.Errorf("no line %s in\n%s", want, out)
		}
	}
	if left, err := os.ReadDir(cmd.Dir); err != nil || len(left) != 0 {
		t.Errorf("the run left %v, %v", left, err)
	}
	again := filepath.Join(dir, "again.yaml")
	if err := os.WriteFile(again, out, 0o600); err != nil {
		t.Fatal(err)
	}
	second, err := testproc.Verve(t, "--print-config", "--config="+again).Output()
	if err != nil {
		t.Fatalf("what was printed is refused: %v", err)
	}
	var one, two map[string]any
	if err := yaml.Unmarshal(out, &one); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(second, &two); err != nil {
		t.Fatal(err)
	}
	if got, want := sprint(two), sprint(one); got != want {
		t.Errorf("read back it is\n%s, want\n%s", got, want)
	}
	if two["counts-file"] != odd {
		t.Errorf("read back the counts file is %q, want %q", two["counts-file"], odd)
	}
	if out, err := testproc.Verve(t, "--print-config", "--window=1ns").CombinedOutput(); err == nil || !bytes.Contains(out, []byte("--window")) {
		t.Errorf("a bad setting: %v %s", err, out)
	}
}

func sprint(v any) string {
	b, _ := yaml.MarshalWithOptions(v, yaml.Flow(true)) // of what was just unmarshalled
	return string(b)
}

// TestSecretsAreToldToNobody looks for each secret in everything that the
// process says: its log, metrics, pages, profiles and settings.
func TestSecretsAreToldToNobody(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	secret := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const signing, token, password, query, redis = "c2lnbmluZy1zM2NyZXQtMDEyMzQ1Njc4OQ==", "admin-s3cret", "kafka-s3cret", "query-s3cret", "redis-s3cret"
	args := []string{
		"--window=1h", "--log-level=debug", "--shutdown-timeout=300ms", "--kafka-brokers=127.0.0.1:9",
		"--callback-secret-file=" + secret("signing", signing), "--admin-token-file=" + secret("token", token),
		"--kafka-sasl=PLAIN", "--kafka-user=verve", "--kafka-password-file=" + secret("password", password),
		"--redis-url=redis://me:" + redis + "@127.0.0.1:9",
	}
	v := testproc.Start(t, args...)
	v.Get(v.Public + "/api/verve/accept?id=1&endpoint=" + v.Public + "/test%3Fkey=" + query)
	v.Get(v.Public + "/api/verve/accept?id=" + query + "&endpoint=http://me:" + query + "@hooks.example.com/")
	var said strings.Builder
	for _, path := range []string{"/", "/readyz", "/metrics", "/api/windows", "/debug/pprof/", "/debug/pprof/cmdline", "/debug/pprof/goroutine?debug=2"} {
		if status, _ := v.Get(v.Admin + path); status != http.StatusUnauthorized && path != "/readyz" {
			t.Errorf("%s without the token: got %d", path, status)
		}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, v.Admin+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(&said, resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != 200 && path != "/readyz" {
			t.Errorf("%s: got %d, %v", path, resp.StatusCode, err)
		}
	}
	v.Until(`"message":"callback"`)
	health := testproc.Verve(t, "healthcheck", "--admin-listen="+strings.TrimPrefix(v.Admin, "http://"))
	if out, err := health.CombinedOutput(); err != nil {
		t.Errorf("healthcheck: %v %s", err, out)
	}
	v.Stop()
	printed, err := testproc.Verve(t, append(args, "--print-config")...).CombinedOutput()
	if err != nil {
		t.Errorf("--print-config: %v", err)
	}
	said.WriteString(v.Text())
	said.Write(printed)
	for _, s := range []string{signing, token, password, query, redis} {
		if i := strings.Index(said.String(), s); i >= 0 {
			t.Errorf("%s is told: ...%q...", s, said.String()[max(0, i-100):i+len(s)])
		}
	}
}

// TestOpenAdminListenerIsWarnedOf: not on loopback, and not with a token.
func TestOpenAdminListenerIsWarnedOf(t *testing.T) {
	t.Parallel()
	const warning = "set --admin-token-file"
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		args []string
		warn bool
	}{
		{"loopback", []string{"--admin-listen=127.0.0.1:0"}, false},
		{"all addresses", []string{"--admin-listen=:0"}, true},
		{"all addresses with a token", []string{"--admin-listen=:0", "--admin-token-file=" + token}, false},
	} {
		v := testproc.StartCmd(t, testproc.Verve(t, append([]string{"--listen=127.0.0.1:0", "--log-format=json", "--window=1h"}, c.args...)...))
		v.Until(`"message":"try: curl`)
		v.Stop()
		if got := strings.Contains(v.Text(), warning); got != c.warn {
			t.Errorf("%s: warned %v, want %v", c.name, got, c.warn)
		}
	}
}

// TestServesTLSFromFiles: the program with the flags, and the pages of the
// admin listener about it.
func TestServesTLSFromFiles(t *testing.T) {
	t.Parallel()
	flags, der := testproc.SelfSigned(t, "verve.example.com")
	v := testproc.Start(t, append(flags, "--window=1h")...)
	if line := v.Until(`"message":"try: curl`); !strings.Contains(line, "curl -k 'https://") {
		t.Errorf("the log says %s", line)
	}
	roots := x509.NewCertPool()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots.AddCert(cert)
	client := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "verve.example.com"}}}
	url := "https" + strings.TrimPrefix(v.Public, "http")
	for _, want := range []int{200, 409} {
		resp, err := client.Get(url + "/api/verve/accept?id=1&endpoint=" + url + "/test")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("got %d, want %d", resp.StatusCode, want)
		}
	}
	if line := v.Until(`"message":"callback"`); !strings.Contains(line, `"result":"delivered"`) {
		t.Errorf("the callback to the own sink: %s", line)
	}
	if _, page := v.Get(v.Admin + "/metrics"); !strings.Contains(page, "verve_tls_certificate_not_after_seconds") {
		t.Error("the metrics do not tell when the certificate expires")
	}
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
