package mount

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// resolve returns target's path as the mount table has it. It resolves the directories above target, never target
// itself, which may be a mount that no longer answers.
func resolve(target string) (string, error) {
	clean := filepath.Clean(target)
	if !filepath.IsAbs(clean) || clean == "/" {
		return "", fmt.Errorf("target %q: %w: not an absolute path below /", target, ErrInvalid)
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(clean))
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, filepath.Base(clean)), nil
}

// makeTarget makes a directory or an empty file to mount on, and the directories above. What is there already is taken
// when it is of the right kind; made says whether it was not.
func makeTarget(target string, directory bool) (path string, made bool, err error) {
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return "", false, err
	}
	path, err = resolve(target)
	if err != nil {
		return "", false, err
	}
	if directory {
		err = os.Mkdir(path, 0o755)
	} else {
		err = makeFile(path)
	}
	if err == nil {
		return path, true, nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return "", false, err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return "", false, err
	}
	if info.IsDir() != directory || !directory && !info.Mode().IsRegular() {
		return "", false, fmt.Errorf("target %s: %w: %s is in the way", path, ErrInvalid, info.Mode().Type())
	}
	return path, false, nil
}

func makeFile(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

// removeTarget removes what makeTarget made, now that nothing is mounted on it; absent is nil. Anything that holds data
// is not ours and stays.
func removeTarget(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.IsDir() && (!info.Mode().IsRegular() || info.Size() > 0) {
		return fmt.Errorf("%s: %w: nothing is mounted on it, and it is no empty file", path, ErrInvalid)
	}
	return os.Remove(path) // of directories only empty ones
}
