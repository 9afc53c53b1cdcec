// Package storage is the one door between the engine and a file. The engine sees only [File]; behind it stand the
// operating system ([Open], [Create]), memory ([Memory]), and for tests a recorder of every operation
// ([Recorder]), an injector of faults ([Faults]) and an enumerator of what a file can hold after a crash ([CrashStates]).
package storage
