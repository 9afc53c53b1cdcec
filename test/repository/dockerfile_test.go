package repository_test

import (
	"debug/elf"
	"encoding/json"
	"go/version"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// instruction is one of a Dockerfile, its continuation lines joined.
type instruction struct {
	keyword string
	args    string
}

// dockerfile reads the Dockerfile. These tests stand in for building the image, which needs a container engine.
func dockerfile(t *testing.T) []instruction {
	t.Helper()
	var lines []string
	for line := range strings.Lines(read(t, "Dockerfile")) {
		if !strings.HasPrefix(strings.TrimSpace(line), "#") {
			lines = append(lines, line)
		}
	}
	var found []instruction
	for line := range strings.Lines(strings.ReplaceAll(strings.Join(lines, ""), "\\\n", " ")) {
		keyword, args, ok := strings.Cut(strings.TrimSpace(line), " ")
		if ok {
			found = append(found, instruction{keyword, strings.Join(strings.Fields(args), " ")})
		}
	}
	return found
}

// argsOf returns the arguments of every instruction with the keyword.
func argsOf(all []instruction, keyword string) []string {
	var found []string
	for _, i := range all {
		if i.keyword == keyword {
			found = append(found, i.args)
		}
	}
	return found
}

// copies splits the arguments of COPY.
func copies(args string) (from string, sources []string, destination string) {
	words := strings.Fields(args)
	if f, ok := strings.CutPrefix(words[0], "--from="); ok {
		from, words = f, words[1:]
	}
	return from, words[:len(words)-1], words[len(words)-1]
}

func TestDockerfileCopiesWhatExists(t *testing.T) {
	kept := read(t, ".dockerignore")
	var copied []string
	for _, args := range argsOf(dockerfile(t), "COPY") {
		from, sources, _ := copies(args)
		if from != "" {
			continue
		}
		for _, s := range sources {
			copied = append(copied, s)
			if _, err := os.Stat(filepath.Join(root, s)); err != nil {
				t.Errorf("COPY %s: %v", s, err)
			}
			if !strings.Contains(kept, "\n!"+s+"\n") {
				t.Errorf("COPY %s: .dockerignore keeps it out of the build", s)
			}
		}
	}
	for _, p := range list(t, "-deps", "./cmd/qcow-csi") {
		if own, ok := strings.CutPrefix(p.ImportPath, module); ok {
			if top, _, _ := strings.Cut(own, "/"); !slices.Contains(copied, top) {
				t.Errorf("the program needs %s, which no COPY brings", own)
			}
		}
	}
}

// TestDockerfileBuilds runs the build command of the image, and follows its result to the entry point.
func TestDockerfileBuilds(t *testing.T) {
	all := dockerfile(t)
	command := regexp.MustCompile(`go build (.*) -ldflags "(.*)" -o (\S+) (\S+)$`)
	var build []string
	for _, run := range argsOf(all, "RUN") {
		if m := command.FindStringSubmatch(run); m != nil {
			build = m
		}
	}
	if build == nil {
		t.Fatal("no RUN builds the program")
	}
	binary := filepath.Join(t.TempDir(), "qcow-csi")
	args := append([]string{"build"}, strings.Fields(build[1])...)
	args = append(args, "-ldflags", strings.ReplaceAll(build[2], "$VERSION", "v0.0.0-image"), "-o", binary, build[4])
	cmd := exec.Command("go", args...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %v: %v\n%s", args, err, out)
	}

	program, err := elf.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := program.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, p := range program.Progs {
		if p.Type == elf.PT_INTERP {
			t.Error("the program is not static")
		}
	}
	out, err := exec.Command(binary, "version").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "v0.0.0-image") {
		t.Errorf("the built version does not reach `qcow-csi version`: %v, %s", err, out)
	}

	var installed string
	for _, args := range argsOf(all, "COPY") {
		if from, sources, destination := copies(args); from != "" && slices.Contains(sources, build[3]) {
			installed = destination
		}
	}
	var entry []string
	if err := json.Unmarshal([]byte(strings.Join(argsOf(all, "ENTRYPOINT"), "")), &entry); err != nil {
		t.Fatalf("ENTRYPOINT: %v", err)
	}
	if len(entry) != 1 || entry[0] != installed {
		t.Errorf("ENTRYPOINT is %q, the program is copied to %q", entry, installed)
	}
}

func TestDockerfileGoVersion(t *testing.T) {
	want := "go" + regexp.MustCompile(`(?m)^go (\S+)$`).FindStringSubmatch(read(t, "go.mod"))[1]
	for _, args := range argsOf(dockerfile(t), "FROM") {
		if m := regexp.MustCompile(`golang:([0-9.]+)`).FindStringSubmatch(args); m != nil {
			if version.Compare(version.Lang("go"+m[1]), version.Lang(want)) < 0 {
				t.Errorf("the image is built with Go %s, go.mod asks for %s", m[1], want)
			}
			return
		}
	}
	t.Error("no stage is a Go image")
}

// imagePackages are the Debian packages of the final stage.
func imagePackages(t *testing.T) []string {
	t.Helper()
	install := regexp.MustCompile(`apt-get install ([^&]*)`)
	for _, run := range argsOf(dockerfile(t), "RUN") {
		if m := install.FindStringSubmatch(run); m != nil {
			return slices.DeleteFunc(strings.Fields(m[1]), func(w string) bool { return strings.HasPrefix(w, "-") })
		}
	}
	t.Fatal("no RUN installs packages")
	return nil
}

// TestDockerfilePackages checks the packages of the image against Debian's archive and against what the driver runs.
func TestDockerfilePackages(t *testing.T) {
	require.Tool(t, "apt-cache", "dpkg")
	provided := map[string]string{} // program to package
	// Debian's slim image has every package that is essential; coreutils is.
	for _, p := range append([]string{"coreutils"}, imagePackages(t)...) {
		if out, err := exec.Command("apt-cache", "show", "--no-all-versions", p).CombinedOutput(); err != nil {
			t.Errorf("package %s is not in the archive: %v\n%s", p, err, out)
		}
		out, err := exec.Command("dpkg", "-L", p).Output()
		require.Feature(t, err == nil, "needs the package "+p)
		for path := range strings.Lines(string(out)) {
			if dir := filepath.Base(filepath.Dir(path)); dir == "bin" || dir == "sbin" {
				provided[filepath.Base(strings.TrimSpace(path))] = p
			}
		}
	}
	used := map[string]bool{}
	for program, where := range executed(t) {
		p, ok := provided[program]
		if !ok {
			t.Errorf("%s runs %s, which no package of the image provides", where, program)
		}
		used[p] = true
	}
	for _, p := range imagePackages(t) {
		if !used[p] {
			t.Errorf("the image installs %s, of which the driver runs nothing", p)
		}
	}
}
