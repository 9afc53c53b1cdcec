// Package storage is the one door between the engine and a file. The engine sees only [File]; behind it stand the
// operating system ([Open], [Create], [OpenWith]), memory ([Memory]), and for tests a recorder of every operation
// ([Recorder], [RecorderGroup] for several files), an injector of faults ([Faults]) and an enumerator of what files can
// hold after a crash ([CrashStates], [GroupCrashStates]).
package storage
