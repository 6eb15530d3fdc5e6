package main

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
)

// composeFile is what the tests look at; that the file as a whole is valid is
// for .ci/run, which reads it with Compose's own library.
type composeFile struct {
	Services map[string]struct {
		Build           string
		Image           string
		Environment     map[string]string
		DependsOn       map[string]struct{ Condition string } `yaml:"depends_on"`
		StopGracePeriod string                                `yaml:"stop_grace_period"`
		CapDrop         []string                              `yaml:"cap_drop"`
		SecurityOpt     []string                              `yaml:"security_opt"`
		ReadOnly        bool                                  `yaml:"read_only"`
		Healthcheck     struct{ Test []string }
	}
}

func readCompose(t *testing.T) composeFile {
	t.Helper()
	b, err := os.ReadFile("docker-compose.yml")
	if err != nil {
		t.Fatal(err)
	}
	var f composeFile
	if err := yaml.Unmarshal(b, &f); err != nil {
		t.Fatal(err)
	}
	return f
}

// imageSettings are the ENV lines of the Dockerfile.
func imageSettings(t *testing.T) map[string]string {
	t.Helper()
	b, err := os.ReadFile("Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	settings := make(map[string]string)
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		if env, ok := strings.CutPrefix(lines.Text(), "ENV "); ok {
			name, value, _ := strings.Cut(env, "=")
			settings[name] = value
		}
	}
	return settings
}

// The containers are configured by names that nothing else checks: an unknown
// variable of the environment is no error.
func TestContainersUseSettingsThatExist(t *testing.T) {
	settings := imageSettings(t)
	for name, value := range readCompose(t).Services["verve"].Environment {
		settings[name] = value
	}
	var help bytes.Buffer
	if _, _, err := parse([]string{"--help"}, &help); err != nil {
		t.Fatal(err)
	}
	known := regexp.MustCompile(`\$(VERVE_[A-Z_]+)`).FindAllStringSubmatch(help.String(), -1)
	for name, value := range settings {
		found := false
		for _, k := range known {
			found = found || k[1] == name
		}
		if !found {
			t.Errorf("%s is no setting of the server", name)
		}
		t.Setenv(name, value)
	}
	if _, _, err := parse(nil, io.Discard); err != nil {
		t.Errorf("the settings of the container are refused: %v", err)
	}
}

func TestContainerHasTimeToStop(t *testing.T) {
	service := readCompose(t).Services["verve"]
	grace, err := time.ParseDuration(service.StopGracePeriod)
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range service.Environment {
		t.Setenv(name, value)
	}
	cfg, _, err := parse(nil, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if grace <= cfg.ShutdownTimeout {
		t.Errorf("got %s until the engine kills the server, want more than its own %s", grace, cfg.ShutdownTimeout)
	}
}

func TestContainersArePinnedAndConfined(t *testing.T) {
	pinned := regexp.MustCompile(`^[a-z]+(/[a-z]+)?:[0-9]+\.[0-9]+\.[0-9]+(-[a-z0-9.]+)?$`)
	f := readCompose(t)
	for name, s := range f.Services {
		if s.Build == "" && !pinned.MatchString(s.Image) {
			t.Errorf("%s: image %q has no exact version", name, s.Image)
		}
		if len(s.CapDrop) != 1 || s.CapDrop[0] != "ALL" {
			t.Errorf("%s: got cap_drop %v, want ALL", name, s.CapDrop)
		}
		if len(s.SecurityOpt) != 1 || s.SecurityOpt[0] != "no-new-privileges:true" {
			t.Errorf("%s: got security_opt %v, want no-new-privileges:true", name, s.SecurityOpt)
		}
		for other, d := range s.DependsOn {
			if d.Condition != "service_healthy" || len(f.Services[other].Healthcheck.Test) == 0 {
				t.Errorf("%s waits for %s to be %q, want service_healthy and a check for it", name, other, d.Condition)
			}
		}
	}
	if !f.Services["verve"].ReadOnly {
		t.Error("verve: the root file system can be written to")
	}
}
