package repository_test

import (
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ +(.+)$`)
	code    = regexp.MustCompile("(?ms)^```[a-z]*\n(.*?)^```|`([^`\n]+)`")
	target  = regexp.MustCompile(`(?m)^([a-z0-9-]+):(.*## .+)?`)
	flag    = regexp.MustCompile(`--[a-z][a-z0-9-]*`)
	setting = regexp.MustCompile(`\bQCOW_CSI_[A-Z_]+\b`)
)

// TestLinks follows every link from a document to a file of the repository, and to a heading of a document.
func TestLinks(t *testing.T) {
	documents := documents(t)
	for name, text := range documents {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			file, anchor, _ := strings.Cut(m[1], "#")
			to := name
			if file != "" {
				to = path.Join(path.Dir(name), file)
			}
			if _, err := os.Stat(filepath.Join(root, to)); err != nil {
				t.Errorf("%s links to %s, which is not there", name, m[1])
			} else if anchor != "" && !slices.Contains(anchors(documents[to]), anchor) {
				t.Errorf("%s links to %s, but %s has no such heading", name, m[1], to)
			}
		}
	}
}

// TestMakeTargets checks that each `make x` in a document is a target, and that `make help` lists every target.
func TestMakeTargets(t *testing.T) {
	makefile := read(t, "Makefile")
	var targets []string
	for _, m := range target.FindAllStringSubmatch(makefile, -1) {
		targets = append(targets, m[1])
		if m[2] == "" {
			t.Errorf("target %s has no help", m[1])
		}
	}
	for _, want := range []string{"demo", "test", "bench", "lint", "e2e-vm", "fuzz", "image", "help"} {
		if !slices.Contains(targets, want) {
			t.Errorf("the Makefile has no target %s", want)
		}
	}
	seen := 0
	for name, text := range documents(t) {
		for _, words := range commands(text, "make") {
			for _, word := range words {
				if strings.Contains(word, "=") || strings.HasPrefix(word, "-") {
					continue
				}
				seen++
				if !slices.Contains(targets, word) {
					t.Errorf("%s says make %s, which is no target", name, word)
				}
			}
		}
	}
	if seen == 0 {
		t.Error("no document says how to use make")
	}
}

// TestNamedTests checks that every test that a document names is there.
func TestNamedTests(t *testing.T) {
	function := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)\w+)\(`)
	there := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		for _, m := range function.FindAllSubmatch(b, -1) {
			there[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`((?:Test|Fuzz|Benchmark)[A-Z]\\w*)`")
	seen := 0
	for name, text := range documents(t) {
		for _, m := range named.FindAllStringSubmatch(text, -1) {
			if seen++; !there[m[1]] {
				t.Errorf("%s names %s, which is not there", name, m[1])
			}
		}
	}
	if seen == 0 {
		t.Error("no document names a test")
	}
}

// TestCommandLines checks each `qcow-csi ...` in a document against the program: the subcommand must exist and must
// know every flag that the document gives it.
func TestCommandLines(t *testing.T) {
	program := filepath.Join(t.TempDir(), "qcow-csi")
	build := exec.Command("go", "build", "-o", program, "./cmd/qcow-csi")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	subcommand := regexp.MustCompile(`^[a-z][a-z-]*$`)
	seen := map[string]bool{}
	for name, text := range documents(t) {
		for _, words := range commands(text, "qcow-csi") {
			// The longest run of leading words that is a subcommand: what follows are arguments.
			var sub []string
			for _, word := range words {
				if !subcommand.MatchString(word) || len(sub) == 2 {
					break
				}
				sub = append(sub, word)
			}
			help, ok := "", len(sub) == 0
			for ; len(sub) > 0 && !ok; sub = sub[:len(sub)-1] {
				if help, ok = helpOf(program, sub); ok {
					seen[strings.Join(sub, " ")] = true
					break
				}
			}
			if !ok {
				t.Errorf("%s says qcow-csi %s, which is no command", name, strings.Join(words, " "))
				continue
			}
			for _, f := range flag.FindAllString(strings.Join(words, " "), -1) {
				if !slices.Contains(flag.FindAllString(help, -1), f) {
					t.Errorf("%s gives %s to qcow-csi %s, which does not know it", name, f, strings.Join(sub, " "))
				}
			}
		}
	}
	for _, want := range []string{"all", "export", "image create", "image info", "image check", "image map", "image resize"} {
		if !seen[want] {
			t.Errorf("no document shows qcow-csi %s", want)
		}
	}
}

// TestSettings checks that each environment variable in a document is one that some source reads.
func TestSettings(t *testing.T) {
	var sources strings.Builder
	for name, text := range files(t) {
		if !strings.HasSuffix(name, ".md") {
			sources.Write(text)
		}
	}
	for name, text := range documents(t) {
		for _, v := range setting.FindAllString(text, -1) {
			if !strings.Contains(sources.String(), v) {
				t.Errorf("%s names %s, which nothing reads", name, v)
			}
		}
	}
}

// helpOf returns what `program sub... --help` prints, if sub is a command: for a word that is none, cobra prints the help of
// the command before it.
func helpOf(program string, sub []string) (string, bool) {
	out, err := exec.Command(program, append(slices.Clone(sub), "--help")...).CombinedOutput()
	usage := regexp.MustCompile(`(?m)^ +qcow-csi ` + regexp.QuoteMeta(strings.Join(sub, " ")) + `( |$)`)
	return string(out), err == nil && usage.Match(out)
}

// documents returns the Markdown files of the repository by path.
func documents(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	for name, text := range files(t) {
		if strings.HasSuffix(name, ".md") {
			found[name] = string(text)
		}
	}
	return found
}

// commands finds the uses of a program in the code of a document, and returns the words after its name.
func commands(text, program string) [][]string {
	var found [][]string
	for _, m := range code.FindAllStringSubmatch(text, -1) {
		block := strings.ReplaceAll(m[1]+m[2], "\\\n", " ")
		for line := range strings.Lines(block) {
			line, _, _ = strings.Cut(line, " #")
			words := strings.Fields(strings.TrimPrefix(strings.TrimSpace(line), "$ "))
			if len(words) > 0 && words[0] == "sudo" {
				words = words[1:]
			}
			if len(words) > 0 && path.Base(words[0]) == program {
				found = append(found, words[1:])
			}
		}
	}
	return found
}

// anchors returns the fragment names that Markdown renderers give to the headings of a document.
func anchors(text string) []string {
	var found []string
	drop := regexp.MustCompile(`[^\p{L}\p{N} _-]`)
	for _, m := range heading.FindAllStringSubmatch(text, -1) {
		name := drop.ReplaceAllString(strings.ToLower(m[1]), "")
		found = append(found, strings.ReplaceAll(name, " ", "-"))
	}
	return found
}
