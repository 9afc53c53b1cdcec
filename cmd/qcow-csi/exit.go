package main

import "errors"

// exitError is an error that ends the program with a status of its own.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// ExitCode returns the exit status.
func (e *exitError) ExitCode() int { return e.code }

// exitCode returns the exit status for what a command returned: 0 for nil, 1 for an error that does not ask for another.
func exitCode(err error) int {
	if err == nil {
		return 0
	}
	if e := (*exitError)(nil); errors.As(err, &e) {
		return e.ExitCode()
	}
	return 1
}
