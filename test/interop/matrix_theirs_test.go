package interop_test

import (
	"errors"
	"fmt"
	"strings"
)

// theirs has QEMU's tools do what is asked.
type theirs struct{ s *subject }

const secretText = "a long sentence that nobody else knows"

// secretObject is how QEMU's tools know the passphrase. A space would be two words for qemu-io.
var secretObject = []string{"--object", "secret,id=key,data=" + strings.ReplaceAll(secretText, " ", "-")}

func passphrase() []byte { return []byte(strings.ReplaceAll(secretText, " ", "-")) }

// spec names the image with --image-opts.
func (s *subject) spec() string {
	spec := "driver=qcow2,file.driver=file,file.filename=" + s.name
	if s.encrypted() {
		spec += ",encrypt.key-secret=key"
	}
	return spec
}

// img runs a command of qemu-img on the image, with arguments before its name, and behind it.
func (q theirs) img(command string, before []string, behind ...string) (string, error) {
	args := []string{command}
	if q.s.encrypted() {
		args = append(args, secretObject...)
	}
	args = append(append(append(args, "--image-opts"), before...), q.s.spec())
	return q.run("qemu-img", append(args, behind...)...)
}

func (q theirs) run(name string, args ...string) (string, error) {
	q.s.say("%s", line(name, args))
	return q.s.b.run(name, args...)
}

func (q theirs) create() error {
	c := q.s.c
	options := []string{
		"compat=" + map[string]string{"2": "0.10", "3": "1.1"}[c.value(byVersion)],
		"cluster_size=" + c.value(byCluster), "refcount_bits=" + c.value(byRefcount),
	}
	given := func(f factor, option, value string) {
		if c.at[f] > 0 {
			options = append(options, option+"="+value)
		}
	}
	given(byLazy, "lazy_refcounts", "on")
	given(byExtended, "extended_l2", "on")
	given(byCompression, "compression_type", q.s.compressionType())
	given(byData, "data_file", q.s.dataFile())
	if c.is(byData, "raw") {
		options = append(options, "data_file_raw=on")
	}
	given(byPreallocation, "preallocation", c.value(byPreallocation))
	args := []string{"create", "-q", "-f", "qcow2"}
	if q.s.encrypted() {
		args = append(args, secretObject...)
		given(byEncryption, "encrypt.format", c.value(byEncryption))
		given(byEncryption, "encrypt.key-secret", "key")
		if c.is(byEncryption, "luks") {
			options = append(options, "encrypt.iter-time=10")
		}
	}
	if b := q.s.backing; b != nil {
		args = append(args, "-b", b.name, "-F", b.format)
	}
	_, err := q.run("qemu-img", append(args, "-o", strings.Join(options, ","), q.s.name, fmt.Sprint(len(q.s.disk)))...)
	return err
}

// compressionType is what the header says.
func (s *subject) compressionType() string {
	if strings.HasPrefix(s.c.value(byCompression), "zstd") {
		return "zstd"
	}
	return "zlib"
}

// send has a qemu-io that is there do the requests. QEMU compresses only into clusters that have nothing; and where it has put compressed data
// before, it goes on to do so when that was discarded and the place has got something else (QEMU 7.2), unless it has opened the image anew.
func (q theirs) send(list []request) error {
	open := "open -t unsafe -d unmap -o " + q.s.spec()
	commands := []string{open}
	for _, r := range list {
		if r.deed == compressedWrite {
			commands = append(commands, request{deed: discard, off: r.off, n: r.n}.String(), "close", open)
		}
		commands = append(commands, r.String())
	}
	commands = append(commands, "close")
	q.s.say("qemu-io %s -c '%s'", line(secretObject[0], secretObject[1:]), strings.Join(commands, "' -c '"))
	session, err := q.s.b.session()
	if err != nil {
		return err
	}
	for _, command := range commands {
		if err = session.tell(command); err != nil {
			session.end()
			return err
		}
	}
	q.s.b.sessions <- session
	return nil
}

func (q theirs) snapshot(name string) error { return q.change("snapshot", []string{"-c", name}) }
func (q theirs) apply(name string) error    { return q.change("snapshot", []string{"-a", name}) }
func (q theirs) remove(name string) error   { return q.change("snapshot", []string{"-d", name}) }

func (q theirs) change(command string, before []string, behind ...string) error {
	_, err := q.img(command, before, behind...)
	return err
}

func (q theirs) addBitmap(d *dirty) error {
	options := []string{"--add", "-g", fmt.Sprint(d.granularity)}
	if d.disabled {
		options = append(options, "--disable")
	}
	return q.change("bitmap", options, d.name)
}

func (q theirs) resize(size int64) error {
	return q.change("resize", []string{"-q", "--shrink"}, fmt.Sprint(size))
}

func (q theirs) amend(a amendment) error {
	var options []string
	if a.version != 0 {
		options = append(options, "compat="+map[int]string{2: "0.10", 3: "1.1"}[a.version])
	}
	if a.refcountBits != 0 {
		options = append(options, fmt.Sprintf("refcount_bits=%d", a.refcountBits))
	}
	if a.toggleLazy {
		options = append(options, "lazy_refcounts="+map[bool]string{true: "off", false: "on"}[q.s.lazy])
	}
	return q.change("amend", []string{"-q", "-o", strings.Join(options, ",")})
}

// rebase names the backing file by its whole path where QEMU has no path of the image to begin from.
func (q theirs) rebase(to *base) error {
	if to == nil {
		return q.change("rebase", []string{"-b", ""})
	}
	name := to.name
	if q.s.encrypted() {
		name = q.s.path(name)
	}
	return q.change("rebase", []string{"-b", name, "-F", to.format})
}

func (q theirs) compact() error { return errors.New("QEMU compacts no images") }
func (q theirs) stream() error  { return errors.New("QEMU streams in a virtual machine only") }
func (q theirs) done() error    { return nil }
